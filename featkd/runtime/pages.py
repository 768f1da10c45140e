"""Report pages: self-contained HTML of one style."""

from __future__ import annotations

from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader

from featkd.runtime.files import atomic_write
from featkd.runtime.names import printable_lines


def render_page(path: Path, package: str, **variables: object) -> None:
    """Writes a page from the template report.html of a package, which extends page.html."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("featkd.runtime")])
    template = Environment(loader=loader, autoescape=True).get_template("report.html")
    with atomic_write(path) as file:
        file.write(printable_lines(template.render(**variables)).encode())
