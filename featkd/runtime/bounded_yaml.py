"""Reads YAML files of bounded size, whose aliases don't expand to more than a bounded size."""

from __future__ import annotations

from pathlib import Path

import yaml

from featkd.runtime.files import read_regular

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000  # keys and values after the expansion of aliases
_MOST_DEPTH = 100


def compose(path: Path) -> yaml.Node | None:
    """Parses a YAML file to its tree of nodes; None for an empty file.

    An alias is a reference in the tree, but code that copies the values expands it: ten nested
    levels of ten aliases are 10^10 values. The tree is therefore counted as if it were expanded.

    Raises:
        OSError: the file can't be read, is no regular file or too large.
        UnicodeDecodeError: it is not UTF-8.
        yaml.YAMLError: it is not YAML, too deep, or has too many values.
    """
    text = read_regular(path, MOST_BYTES).decode()
    try:
        root: yaml.Node | None = yaml.compose(text, yaml.SafeLoader)
    except RecursionError as error:
        raise yaml.YAMLError(f"nested more than {_MOST_DEPTH} levels deep") from error
    if root is not None:
        _expanded_size(root, {}, 0)
    return root


def _expanded_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Number of a node's keys and values after the expansion of its aliases."""
    if depth > _MOST_DEPTH:  # also reached by an alias within its own anchor
        raise yaml.YAMLError(f"nested more than {_MOST_DEPTH} levels deep")
    if id(node) in known:
        return known[id(node)]
    size = 1
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                size += _expanded_size(part, known, depth + 1)
                if size > MOST_VALUES:
                    raise yaml.YAMLError(f"aliases expand to more than {MOST_VALUES} values")
    known[id(node)] = size
    return size
