"""Preparation of data, from raw text to shards. Does not import torch."""
