"""Held-out evaluation and replaced-token detection."""
