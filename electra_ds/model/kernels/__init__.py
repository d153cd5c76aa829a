"""Kernels: attention, linear, dropout, vocabulary head. They import torch alone."""
