"""Arguments of the commands that take a recipe: `distill` and `cache`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import Namespace

from featkd.cli.arguments import Parser
from featkd.train.recipe import (
    Recipe,
    TeacherConfig,
    find_recipe,
    read_recipe_config,
    shipped_recipes,
)


def recipe_parser(command: str, purpose: str, examples: Sequence[str]) -> Parser:
    """Return the parser of a command with an option for every field of a recipe.

    Args:
        command: name of the command.
        purpose: sentence that the description begins with.
        examples: see `Parser`.
    """
    parser = Parser(
        prog=f"featkd {command}",
        usage=f"featkd {command} RECIPE [--option value ...]",
        description=f"{purpose} RECIPE is a YAML file or the name of a recipe that ships with "
        f"featkd: {', '.join(shipped_recipes())}. An option overrides a field of the recipe.",
        examples=examples,
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    parser.add_class_arguments(Recipe)
    for action in parser._actions:
        if action.dest == "data":
            action.metavar, action.help = "DIR", "short for --data.path"
        elif action.dest == "teacher":
            names = (f"--teacher.{field.name}" for field in fields(TeacherConfig))
            action.help = f"null: train the student alone; fields: {', '.join(names)}"
        elif action.help == "Path to a configuration file.":  # the other groups of fields
            action.help = argparse.SUPPRESS
    return parser


def parse_recipe(parser: Parser, words: Sequence[str]) -> tuple[Recipe, Namespace]:
    """Return the recipe of a command line and its parsed options.

    Args:
        parser: parser from `recipe_parser`.
        words: arguments of the command, the recipe first.

    Raises:
        RecipeError: no such recipe, or an unknown field in it.
        UsageError: an unknown option or a bad value.
    """
    words = [_long_option(word) for word in words]
    if words and not words[0].startswith("-"):
        words = ["--config", read_recipe_config(find_recipe(words[0])), *words[1:]]
    options = parser.parse_args(words)
    built = parser.instantiate(options)
    return Recipe(**{field.name: built[field.name] for field in fields(Recipe)}), options


def _long_option(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--data.path{equals}{value}" if name == "--data" else word
