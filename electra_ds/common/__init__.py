"""What every room uses: errors, files, processes, plugins."""
