"""Pretraining on a DeepSpeed engine: loop, checkpoints, metrics."""
