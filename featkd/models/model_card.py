"""Model cards: README.md of an exported model, from templates/model_card.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, meta

from featkd.runtime.names import printable

_TEMPLATE = "model_card.md"
NOT_GIVEN = "not given"


def render_card(fields: Mapping[str, Any]) -> str:
    """Fills in the model card.

    Args:
        fields: name, license (or NOT_GIVEN), task (of the Hugging Face Hub), summary, needs_featkd,
            and the tables model, training and scores.

    Raises:
        ValueError: a field of the template is missing; names it.
    """
    environment = Environment(
        loader=PackageLoader("featkd.models"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML; cells are escaped by their own filter
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    assert environment.loader is not None
    source = environment.loader.get_source(environment, _TEMPLATE)[0]
    needed = meta.find_undeclared_variables(environment.parse(source))
    if missing := sorted(needed - fields.keys()):
        raise ValueError(
            f"model card: no field {', '.join(missing)}; expected {', '.join(sorted(needed))}"
        )
    return environment.get_template(_TEMPLATE).render(fields)


def _cell(value: object) -> str:
    """Text of a table's cell, on one line."""
    return printable(value).replace("|", r"\|").replace("<", "&lt;")
