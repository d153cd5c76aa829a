"""Encoders, heads, objective and kernels."""
