"""Tokenizers, shard format, row readers, shuffle, masking and the loader of batches."""
