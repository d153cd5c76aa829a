"""Which files are the input, and how they are opened."""
