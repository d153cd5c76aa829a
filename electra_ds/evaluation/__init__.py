"""Evaluation on held-out rows, and detection of replaced tokens in text."""
