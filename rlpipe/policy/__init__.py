"""The policy: a unified multimodal model, its prompt strings, and what guidance makes of its logits."""
