"""Responses of a policy: decoded from one copy of a prompt's cache, or drawn by a server."""
