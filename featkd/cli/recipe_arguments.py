"""Arguments of the commands that take a recipe: `distill`, `cache` and `compare`."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence

from jsonargparse import Namespace

from featkd.cli.arguments import Parser, UsageError, from_options, is_group_of_fields
from featkd.cli.output import warn
from featkd.train.recipe import PooledConfig, Recipe, RecipeError, TeacherConfig
from featkd.train.recipe_file import find_recipe, read_recipe_config, shipped_recipes

_CONFIG = "--recipe_file"  # internal; a user names the recipe as the first argument


def recipe_parser(
    command: str, purpose: str, examples: Sequence[str], usage: str = "", **texts: tuple[str, str]
) -> Parser:
    """Return the parser of a command with an option for every field of a recipe.

    Args:
        command: name of the command.
        purpose: sentence that the description begins with.
        examples: see `Parser`.
        usage: further line of the usage.
        **texts: metavars and help texts of options, in place of those of the recipe's fields.
    """
    first = f"featkd {command} RECIPE [--option value ...]"
    parser = Parser(
        prog=f"featkd {command}",
        usage="\n       ".join(filter(None, (first, usage))),
        description=f"{purpose} RECIPE is a YAML file or the name of a recipe that ships with "
        f"featkd: {', '.join(shipped_recipes())}. An option overrides a field of the recipe; a "
        "default below is for a field that the recipe does not set.",
        examples=examples,
    )
    parser.add_argument(_CONFIG, action="config", help=argparse.SUPPRESS)
    parser.add_class_arguments(Recipe)
    texts["data"] = "DIR", "short for --data.path"
    texts["teacher"] = "null", "train the student alone"
    texts["loss.pooled"] = "null", "compare no pooled features"
    for action in parser._actions:
        if action.dest in texts:
            action.metavar, action.help = texts[action.dest]
        elif is_group_of_fields(action):
            action.help = argparse.SUPPRESS
    # jsonargparse describes no fields of a dataclass that may be null.
    for section, config, title in (
        ("teacher", TeacherConfig, "the model that is distilled"),
        ("loss.pooled", PooledConfig, "the distance of pooled features"),
    ):
        parser.remove_option(f"--{section}.help")  # a nested help
        nullable = Parser(prog=parser.prog)
        nullable.add_class_arguments(config, section)
        parser.describe_options_of(nullable, title)
    return parser


def parse_recipe(parser: Parser, words: Sequence[str]) -> tuple[Recipe, Namespace]:
    """Return the recipe of a command line and its parsed options.

    Args:
        parser: parser from `recipe_parser`.
        words: arguments of the command, the recipe before, between or after the options.

    Raises:
        RecipeError: no such recipe, or an unknown field in it.
        UsageError: no arguments, two recipes, an unknown option or a bad value.
    """
    if not words:
        raise UsageError(
            f"name a recipe: a YAML file, or one of {', '.join(shipped_recipes())} "
            f"(see {parser.prog} --help)"
        )
    words = [_long_option(word) for word in words]
    parser.check_options(words, hidden=(_CONFIG,))
    names = parser.positional(words)
    if len(names) > 1:
        first, second = (words[index] for index in names[:2])
        raise UsageError(
            f"expected one recipe, got {first!r} and {second!r}; the folder of images is "
            f"--data DIR (see {parser.prog} --help)"
        )
    if names:
        words.insert(0, words.pop(names[0]))  # a recipe's fields come before those that override
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            words = [_CONFIG, read_recipe_config(find_recipe(words[0])), *words[1:]]
        for note in notes:  # without the line of source that warnings are shown with
            warn(str(note.message))
    options = parser.parse_args(words)
    try:
        built = parser.instantiate(options)
    except ValueError as error:  # of a section that may be null, jsonargparse lists all types
        cause = re.search(r"subtypes.*?^  - (.*?)$", str(error), flags=re.MULTILINE | re.DOTALL)
        if cause is None:
            raise
        raise RecipeError(cause[1]) from error
    return from_options(Recipe, built), options


def _long_option(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--data.path{equals}{value}" if name == "--data" else word
