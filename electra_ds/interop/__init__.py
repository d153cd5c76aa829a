"""Foreign names: the only place that knows what others call our parameters."""
