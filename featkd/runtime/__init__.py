"""Services of the process: ranks, signals, seeds, files, remote paths, environment."""
