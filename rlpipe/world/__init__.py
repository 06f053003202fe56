"""A tiny world of coloured shapes with prompts, a renderer and an exact checker.

It stands in for a real image benchmark wherever a run must finish on a CPU in minutes.
"""
