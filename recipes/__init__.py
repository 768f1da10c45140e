"""Recipes as YAML files: the published runs, the demo, and runs that fit two CPU cores."""
