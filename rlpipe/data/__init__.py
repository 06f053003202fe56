"""What training reads: prompts, and supervised examples of the three sub-tasks."""
