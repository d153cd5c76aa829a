"""Code that all other subpackages use: errors, files, processes, plugins."""
