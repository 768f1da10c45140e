"""MkDocs hooks: what the site adds to docs/, which GitHub shows as it is.

- Files outside of docs/ that a page links to become pages or files of the site. A link that is
  alone in its line shows the file's content as well.
- Links that are named after a file, as in [cache.md](cache.md), get the title of the page.
- The tables of a recipe's fields are made from the docstrings of its dataclasses.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from os.path import normpath
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# pages of the site that no page links to
PROJECT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
# A link out of docs/: `../` as often as the page is deep. The page's depth is checked apart.
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)(?=\w)([^)#]+)")
ALONE = re.compile(r"^(\[[^]]+\]\((?:\.\./)+([^)#]+)\))$", re.MULTILINE)
FIELDS = "<!-- fields of a recipe -->"
NAMED = re.compile(r"\[([\w-]+\.md)\](?=\(((?:[\w./-]*/)?\1)[#)])")  # [cache.md](cache.md#logits)
TITLES = dict[str, str]()  # path of a page -> its title in the navigation
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside of docs/ that pages link to, and keeps the titles of all pages."""
    TITLES.update(_titles(config.nav))
    wanted = set(PROJECT)
    for page in files.documentation_pages():
        for ups, target in OUTSIDE.findall(page.content_string):
            if ups.count("/") == _depth(page):
                wanted.add(target)
    for target in sorted(x for x in wanted if (ROOT / x).is_file()):  # mkdocs reports the others
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Writes the table of fields, shows linked files, and makes docs/ the root of all links."""
    if not (ROOT / "docs" / page.file.src_uri).exists():
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", text)
    folder = page.file.src_uri.rpartition("/")[0]
    text = NAMED.sub(
        lambda x: f"[{TITLES.get(normpath(f'{folder}/{x[2]}'.lstrip('/')), x[1])}]", text
    )
    text = ALONE.sub(lambda x: f"{x[1]}\n\n{_shown(ROOT / x[2])}", text)
    if FIELDS in text:
        recipe = griffe.load("featkd.train.recipe.Recipe", search_paths=[str(ROOT)])
        text = text.replace(FIELDS, "\n".join(_sections(recipe)))
    depth = _depth(page.file)
    return OUTSIDE.sub(lambda x: f"]({x[1][3:] if x[1].count('/') == depth else x[1]}{x[2]}", text)


def _titles(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """Yields path and title of each page in the navigation."""
    for entry in nav:
        for title, below in entry.items():
            if isinstance(below, str):
                yield below, title
            else:
                yield from _titles(below)


def _depth(file: File) -> int:
    """Number of `../` that lead from a page to the repository's root."""
    return file.src_uri.count("/") + 1


def _shown(path: Path) -> str:
    """The content of a linked file as Markdown: code, or the cells of a notebook."""
    if path.suffix != ".ipynb":
        return f"```{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text().rstrip()}\n```"
    cells = json.loads(path.read_text())["cells"]
    sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    shown = [f"```python\n{text}\n```" if kind == "code" else text for text, kind in sources]
    return re.sub(r"\A# .*\n", "", "\n\n".join(shown))  # without its title


def _sections(found: griffe.Object, prefix: str = "") -> Iterator[str]:
    """Yields the lines of the tables of a recipe's dataclass and of those in its fields."""
    intro, arguments = (part.value for part in _parsed(found.docstring))
    texts = {
        name: " ".join(argument.description.split())
        for argument in arguments
        for name in argument.name.split(", ")  # as in "mean, std: ..."
    }
    yield f"## {f'`{prefix}`' if prefix else 'Top level'}\n\n{intro}\n"
    yield "| field | default | meaning |\n|---|---|---|"
    nested = dict[str, str]()
    for name, field in found.attributes.items():
        if name not in texts:  # a property
            continue
        path, default = f"{prefix}.{name}".lstrip("."), _default(str(field.value))
        inner = re.search(r"\w+Config", str(field.annotation))
        if inner:
            nested[path] = inner[0]
            link = f"[below](#{path.replace('.', '')})"
            default = f"null; {link}" if default == "null" else link
        yield f"| `{path}` | {default} | {texts[name]}{_other_values(field, texts[name])} |"
    yield ""
    for path, inner_kind in nested.items():
        inner_class = found.module[inner_kind]
        yield from _sections(getattr(inner_class, "final_target", inner_class), path)


def _parsed(docstring: griffe.Docstring) -> list[griffe.DocstringSection]:
    """The introduction and the arguments of a dataclass's docstring."""
    parsed = docstring.parse("google", warn_unknown_params=False, warn_missing_types=False)
    kinds = griffe.DocstringSectionKind.text, griffe.DocstringSectionKind.parameters
    return [next(part for part in parsed if part.kind is kind) for kind in kinds]


def _default(code: str) -> str:
    """Writes a field's default as in YAML."""
    code = re.sub(r"^field\(default_factory=(?:lambda: )?(.*)\)$", r"\1", code)
    try:
        value = {} if code == "dict" else ast.literal_eval(code)
    except ValueError:  # a quotient, or a section
        value = code.replace("(", "[").replace(")", "]")
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if text == "null" else f"`{text}`"


def _other_values(field: griffe.Attribute, text: str) -> str:
    """The values of a field's Literal, unless its description names them."""
    annotation = str(field.annotation)
    if annotation in field.module.attributes:  # an alias of a type
        annotation = str(field.module[annotation].value)
    values = re.findall(r"'([^']*)'", annotation)
    if all(value in text for value in values):
        return ""
    return f" One of {', '.join(values)}."
