"""Kernels that depend only on torch: attention, linear layers, dropout, vocabulary head."""
