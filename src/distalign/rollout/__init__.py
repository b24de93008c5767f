"""Responses of a policy: sampled by a backend, decoded from one copy of a prompt's cache."""
