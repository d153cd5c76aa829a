"""Code that all other packages use: errors, files, JSON, names, processes, plugins."""
