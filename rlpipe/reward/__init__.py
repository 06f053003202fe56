"""Scorers: a picture and a prompt in, a number or a reason for its absence out."""
