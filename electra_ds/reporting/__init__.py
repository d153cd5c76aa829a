"""Reports about runs: check, memory, status, plot."""
