"""The README's snippets run, the links of the documents exist, and the site builds from them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from featkd.train.recipe import Recipe
from featkd.train.recipe_file import field_types

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [ROOT / "README.md"], ids=lambda p: p.name)
def test_snippets_run(page: Path):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    assert len(snippets) >= 2
    for snippet in snippets:
        names: dict[str, object] = {}
        exec(compile(snippet, str(page), "exec"), names)
        assert all(
            x.isfinite().all() for x in (names.get("loss"), names.get("logits")) if x is not None
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(page: Path):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


class Loaded(HTMLParser):
    """Addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.found += [x for name, x in attrs if name in ("src", "href", "srcset") and x]


def fields_of(kind: type, prefix: str = "") -> Iterator[str]:
    for name, inner in field_types(kind).items():
        yield f"{prefix}{name}"
        if inner is not None:
            yield from fields_of(inner, f"{prefix}{name}.")


def test_site_builds_from_its_own_files(tmp_path: Path):
    """`strict` fails for a link to no page or heading, and for a page outside the navigation."""
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) - 2  # the README is no page; 404.html is one
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert not [x for x in loaded.found if "//" in x], page
    recipe = (tmp_path / "reference/recipe.html").read_text()
    fields = set(re.findall(r"<tr>\s*<td><code>([\w.]+)</code></td>", recipe))
    assert fields == set(fields_of(Recipe))
    functions = (tmp_path / "reference/functional.html").read_text()
    assert 'id="featkd.functional.projected_feature_kd"' in functions
    for page in tmp_path.glob("reference/*.html"):
        assert "<blockquote>" not in page.read_text(), f"{page}: an example is not shown as code"
