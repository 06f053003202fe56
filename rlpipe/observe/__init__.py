"""Seeing a run: metrics, tracker, terminal view, gallery and report."""
