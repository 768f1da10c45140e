"""Model cards: README.md of an exported model, from templates/model_card.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from featkd.runtime.names import printable

NOT_GIVEN = "not given"


def render_card(fields: Mapping[str, Any]) -> str:
    """Fills in the model card.

    Args:
        fields: name, license (or NOT_GIVEN), task (of the Hugging Face Hub), summary, needs_featkd,
            and the tables model, training and scores.
    """
    environment = Environment(
        loader=PackageLoader("featkd.models"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML; cells are escaped by their own filter
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("model_card.md").render(fields)


def _cell(value: object) -> str:
    """Text of a table's cell, on one line."""
    return printable(value).replace("|", r"\|").replace("<", "&lt;")
