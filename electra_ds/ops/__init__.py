"""Pure tensor functions with a fast path and a plain one that means the same."""
