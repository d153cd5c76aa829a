"""Stages of `prepare`, from documents to shards."""
