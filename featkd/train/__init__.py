"""Training by feature distillation: recipes, the loop, checkpoints, the dry run."""
