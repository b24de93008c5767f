"""The trainer, and what a method that learns from its own responses needs around it."""
