"""Raw text in, shards out; never imports torch."""
