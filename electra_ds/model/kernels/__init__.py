"""Kernels that depend on torch alone: attention, linear layers, dropout, vocabulary head."""
