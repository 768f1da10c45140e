"""Training by feature distillation: recipes, trainer, checkpoints, dry run."""

from featkd.train.export import export_checkpoint
from featkd.train.recipe import Recipe
from featkd.train.recipe_file import find_recipe, load_recipe
from featkd.train.trained import load_trained
from featkd.train.trainer import Outcome, Trainer

__all__ = [
    "Outcome",
    "Recipe",
    "Trainer",
    "export_checkpoint",
    "find_recipe",
    "load_recipe",
    "load_trained",
]
