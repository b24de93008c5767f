"""Policies on the same held-out prompts and pairs: what they are, how far from the reference, and who wins."""
