"""Encoders, heads, objectives and kernels."""
