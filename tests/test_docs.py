"""The README's snippets run, and the relative links of the documents exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_exist(page: Path):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
