"""The stages that make the tiny world's trained checkpoints from nothing; `launch/build_tiny.py` runs them."""
