"""Models: loading, the policy and its reference, known targets, the model card."""
