"""Process-level services: ranks, signals, seeds, files, remote paths, environment."""
