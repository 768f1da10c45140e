"""Recipe files: finding, checking and reading them."""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from featkd.runtime import bounded_yaml
from featkd.runtime.suggest import suggestion
from featkd.train.recipe import NO_FASTEST, PooledConfig, Recipe, RecipeError, TeacherConfig


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship with featkd."""
    folder = resources.files("featkd.recipes")
    return sorted(p.name[: -len(".yaml")] for p in folder.iterdir() if p.name.endswith(".yaml"))


def find_recipe(name: str) -> Path:
    """Finds a recipe file by path, or by the name of a shipped recipe.

    Raises:
        RecipeError: there is neither, or it is a folder; suggests the nearest shipped name.
    """
    if Path(name).is_file():
        return Path(name)
    names = shipped_recipes()
    if Path(name).is_dir() and name not in names:
        raise RecipeError(
            f"recipe: {name!r} is a folder; expected a YAML file or one of {', '.join(names)}; a "
            "folder of images is --data DIR"
        )
    if name in names:
        return Path(str(resources.files("featkd.recipes") / f"{name}.yaml"))
    raise RecipeError(
        f"recipe: no file {name!r} and no shipped recipe of that name; shipped: "
        f"{', '.join(names)}{suggestion(name, names)}"
    )


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        RecipeError: it can't be read, has an unknown field, or values of a wrong type.
        ValueError: values out of range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    config = read_recipe_config(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    try:
        parsed = parser.parse_args(["--config", config])
    except ArgumentError as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    built = parser.instantiate(parsed)
    return Recipe(**{entry.name: built[entry.name] for entry in dataclasses.fields(Recipe)})


def read_recipe_config(path: Path) -> str:
    """Checks the fields of a recipe file; returns a value for jsonargparse's config option.

    That is the path, or the YAML text if it must differ from the file: a field that only earlier
    versions had is removed, and words such as off, which YAML takes for false, are quoted.

    Raises:
        RecipeError: it can't be read, or has an unknown field; suggests the nearest field.
    """
    try:
        root = bounded_yaml.compose(path)
        inference = _remove_field(root, "teacher", "inference")
        quoted = _quote_words(root, Recipe)
        text: str = "" if root is None else yaml.serialize(root)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path}: can't be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of fields, got {content!r}")
    _check_mapping(content, Recipe, path, "")
    if inference == "fastest":
        warnings.warn(f"recipe {path}: {NO_FASTEST}", stacklevel=2)
    return text if quoted or inference is not None else str(path)


def _remove_field(root: yaml.Node | None, section: str, field: str) -> str | None:
    """Removes a field from a section of a YAML tree; returns the field's value, if any.

    The tree keeps the spelling of all numbers: YAML parsers differ on "1e-5".
    """
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == section and isinstance(value, yaml.MappingNode):
            found = [node.value for name, node in value.value if name.value == field]
            value.value = [pair for pair in value.value if pair[0].value != field]
            return str(found[0]) if found else None
    return None


def _quote_words(root: yaml.Node | None, cls: type) -> bool:
    """Makes strings of the booleans in fields that take words; returns True if there are any.

    YAML 1.1 reads an unquoted off, on, yes or no as a boolean.
    """
    hints, inner = typing.get_type_hints(cls), field_types(cls)
    found = False
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        name = key.value
        if inner.get(name) is not None:
            found |= _quote_words(value, typing.cast(type, inner[name]))
        elif name in hints and value.tag == _YAML_BOOL and bool not in _kinds(hints[name]):
            value.tag, value.style, found = _YAML_STR, "'", True
    return found


_YAML_BOOL, _YAML_STR = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:str"


def _kinds(hint: Any) -> tuple[type, ...]:
    """Returns the types of values that a type hint without containers allows."""
    if typing.get_origin(hint) is Literal:
        return tuple(map(type, typing.get_args(hint)))
    return typing.get_args(hint) or (hint,)


def _check_mapping(content: Mapping[str, Any], cls: type, path: Path, prefix: str) -> None:
    known = field_types(cls)
    for key, value in content.items():
        if key not in known:
            raise RecipeError(
                f"recipe {path}: unknown field {prefix + str(key)!r}"
                f"{suggestion(str(key), list(known))}; fields here: {', '.join(known)}"
            )
        inner = known[key]
        if inner is None or (value is None and inner in (TeacherConfig, PooledConfig)):
            continue
        if not isinstance(value, dict):
            raise RecipeError(
                f"recipe {path}: {prefix}{key}: expected a mapping of fields, got {value!r}"
            )
        _check_mapping(value, inner, path, f"{prefix}{key}.")


def field_types(cls: type) -> dict[str, type | None]:
    """Maps field names to the dataclass they hold, or to None for a plain value."""
    hints = typing.get_type_hints(cls)
    found: dict[str, type | None] = {}
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        inner = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
        found[entry.name] = inner[0] if inner else None
    return found
