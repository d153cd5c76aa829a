"""From text to batches: tokenizer, shard format, readers, shuffle, masking, loader."""
