"""What is reported about runs: check, memory, status, plot."""
