"""Measuring a policy: outcomes on held-out prompts, agreement, and the table without / with introspection."""
