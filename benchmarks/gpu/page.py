"""Results as JSON, as a Markdown page, and as tables inside another document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .recorder import Item
from .schedule import Outcome

MARK = "gpu"


def content(found: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns {"meta", "parts", "rows"}; rows have "name", "variant", "metric", "unit", "value"."""
    rows = [
        {
            "name": f"{outcome.part.name}/{item.name}",
            "variant": variant,
            "metric": metric,
            "unit": unit,
            "value": value,
        }
        for outcome in outcomes
        for item in outcome.items
        for variant, metric, unit, value in item.figures
    ]
    parts = [
        {
            "name": outcome.part.name,
            "about": outcome.part.about,
            "good": outcome.is_good,
            "seconds": round(outcome.seconds, 1),
            "problem": outcome.problem,
            "passed": outcome.count("passed"),
            "failed": [_entry(x) for x in outcome.items if x.status in ("failed", "begun")],
            "cut": [_entry(item) for item in outcome.items if item.status == "cut"],
            "skipped": [_entry(item) for item in outcome.items if item.status == "skipped"],
            "log": outcome.log if not outcome.is_good else "",
        }
        for outcome in outcomes
    ]
    return {"meta": dict(found), "parts": parts, "rows": rows}


def _entry(item: Item) -> dict[str, str]:
    return {"name": item.name, "message": item.message}


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"| {' | '.join(header)} |\n|---|{'--:|' * (len(header) - 1)}\n{rows}"


def origin(meta: Mapping[str, Any]) -> str:
    """Describes GPU, driver, versions, commit and day in one line."""
    gpus = [gpu[0] for gpu in meta["gpus"]] or ["no GPU"]
    return (
        f"{gpus[0]} ({len(meta['gpus'])} here), driver {meta['driver']}, CUDA {meta.get('cuda')}, "
        f"Python {meta.get('python')}, torch {meta.get('torch')}, Triton {meta.get('triton')}, "
        f"timm {meta.get('timm')}, featkd {meta['commit'][:10]}, {meta['time'][:10]}"
    )


def page(results: Mapping[str, Any]) -> str:
    """Returns the page."""
    meta = results["meta"]
    name = meta["gpus"][0][0] if meta["gpus"] else "no GPU"
    text = [f"# featkd on {name}\n\n{origin(meta)}; nvcc: {meta['nvcc']}.\n"]
    if meta.get("carry"):
        text.append("\nMissing packages, to be brought as wheels:\n")
        text += [f"\n- {line}" for line in meta["carry"]]
        text.append("\n")
    lines = [
        (
            part["name"],
            "yes" if part["good"] else "**no**",
            str(part["passed"]),
            str(len(part["failed"])),
            str(len(part["cut"])),
            str(len(part["skipped"])),
            f"{part['seconds']:.0f}",
        )
        for part in results["parts"]
    ]
    text.append("\n" + _table(("part", "good", "passed", "failed", "cut", "skipped", "s"), lines))
    for part in results["parts"]:
        if part["problem"]:
            text.append(f"\n**{part['name']}**: {_short(part['problem'])}\n")
        for kind in ("failed", "cut", "skipped"):
            reasons: dict[str, list[str]] = {}
            for item in part[kind]:
                reasons.setdefault(_short(item["message"]) or "did not end", []).append(
                    item["name"]
                )
            text += [
                f"\n- {part['name']}, {kind}: {', '.join(names[:6])}"
                f"{f' and {len(names) - 6} more' if len(names) > 6 else ''}: {reason}"
                for reason, names in reasons.items()
            ]
    return "".join([*text, "\n\n", tables(results)])


def _short(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:400]


def tables(results: Mapping[str, Any]) -> str:
    """Returns the tables of ops, updates and launches."""
    by_name: dict[str, dict[tuple[str, str], float]] = {}
    for row in results["rows"]:
        by_name.setdefault(row["name"], {})[row["variant"], row["metric"]] = row["value"]
    text = []
    speed = {k.removeprefix("speed/"): v for k, v in by_name.items() if k.startswith("speed/")}
    names = ("eager", "compile", "reference", "featkd")
    for metric, title in (
        ("gpu_us", "GPU time, us (launched from Python, L2 flushed before)"),
        ("graph_us", "GPU time as a CUDA graph, us"),
        ("host_us", "Host time, us"),
    ):
        lines = []
        for case, values in speed.items():
            cells = [values.get((name, metric)) for name in names]
            if any(cell is not None for cell in cells):
                ours, others = cells[-1], [x for x in cells[:-1] if x is not None]
                ratio = f"{min(others) / ours:.2f}" if ours and others else ""
                shown = [f"{x:.1f}" if x is not None else "failed" for x in cells]
                lines.append((case, *shown, ratio))
        if lines:
            header = ("forward and backward", *names, "best of the others / featkd")
            text.append(f"{title}:\n\n{_table(header, lines)}\n")
    updates = [
        (
            case.removeprefix("updates/"),
            f"{values['featkd', 'update']:.1f}",
            f"{values['featkd', 'images_per_s']:.0f}",
            f"{values['featkd', 'first_loss']:.3f}",
            f"{values['featkd', 'last_loss']:.3f}",
        )
        for case, values in by_name.items()
        if case.startswith("updates/")
    ]
    if updates:
        columns = ("update of the trainer", "ms", "images/s", "first loss", "last loss")
        text.append(_table(columns, updates) + "\n")
    launches = [
        (variant, f"{value:.1f}")
        for case, values in by_name.items()
        if case.startswith("launches/")
        for (variant, metric), value in values.items()
        if metric == "time"
    ]
    if launches:
        text.append(_table(("launch", "us"), launches) + "\n")
    return "\n".join([*text, f"{origin(results['meta'])}.\n"])


def write(folder: Path, name: str, results: Mapping[str, Any]) -> list[Path]:
    """Writes NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(page(results))
    return paths


def write_into(document: Path, source: Path) -> None:
    """Writes the tables of a JSON file between a document's marks `<!-- bench gpu -->`."""
    from ..table import write_into as put

    put(document, MARK, tables(json.loads(source.read_text())))
