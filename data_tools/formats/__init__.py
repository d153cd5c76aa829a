"""Readers of input formats."""
