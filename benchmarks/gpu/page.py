"""Results as JSON, as a Markdown page, and as tables inside another document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .schedule import Outcome

MARK = "gpu"
_COLUMNS = ("name", "variant", "metric", "unit", "value")


def content(found: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns {"meta", "parts", "rows"}; rows have "name", "variant", "metric", "unit", "value"."""
    rows = [
        dict(zip(_COLUMNS, (f"{outcome.part.name}/{item.name}", *figure), strict=True))
        for outcome in outcomes
        for item in outcome.items
        for figure in item.figures
    ]
    return {"meta": dict(found), "parts": [_part(x) for x in outcomes], "rows": rows}


def _part(outcome: Outcome) -> dict[str, Any]:
    def items(*statuses: str) -> list[dict[str, str]]:
        found = [x for x in outcome.items if x.status in statuses]
        return [{"name": x.name, "message": x.message} for x in found]

    return {
        "name": outcome.part.name,
        "about": outcome.part.about,
        "good": outcome.is_good,
        "seconds": round(outcome.seconds, 1),
        "problem": outcome.problem,
        "passed": outcome.count("passed"),
        "failed": items("failed", "begun"),
        "cut": items("cut"),
        "skipped": items("skipped"),
        "log": outcome.log if not outcome.is_good else "",
    }


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
    kinds = ("failed", "cut", "skipped")
    lines = []
    for part in results["parts"]:
        good = "yes" if part["good"] else "**no**"
        counts = (part["passed"], *(len(part[kind]) for kind in kinds))
        lines.append((part["name"], good, *map(str, counts), f"{part['seconds']:.0f}"))
    text.append("\n" + _table(("part", "good", "passed", *kinds, "s"), lines))
    for part in results["parts"]:
        if part["problem"]:
            text.append(f"\n**{part['name']}**: {_short(part['problem'])}\n")
        for kind in kinds:
            reasons: dict[str, list[str]] = {}
            for item in part[kind]:
                reason = _short(item["message"]) or "did not end"
                reasons.setdefault(reason, []).append(item["name"])
            for reason, names in reasons.items():
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                text.append(f"\n- {part['name']}, {kind}: {', '.join(names[:6])}{more}: {reason}")
    return "".join([*text, "\n\n", tables(results)])


def _short(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:400]


def tables(results: Mapping[str, Any]) -> str:
    """Returns the tables of ops, updates and launches."""
    parts: dict[str, dict[str, dict[tuple[str, str], float]]] = {}
    for row in results["rows"]:
        part, _, name = row["name"].partition("/")
        values = parts.setdefault(part, {}).setdefault(name, {})
        values[row["variant"], row["metric"]] = row["value"]
    text = []
    names = ("eager", "compile", "reference", "featkd")
    for metric, title in (
        ("gpu_us", "GPU time, us (launched from Python, L2 flushed before)"),
        ("graph_us", "GPU time as a CUDA graph, us"),
        ("host_us", "Host time, us"),
    ):
        lines = []
        for case, values in parts.get("speed", {}).items():
            *others, ours = cells = [values.get((name, metric)) for name in names]
            known = [x for x in others if x is not None]
            if ours or known:
                ratio = f"{min(known) / ours:.2f}" if ours and known else ""
                shown = [f"{x:.1f}" if x is not None else "failed" for x in cells]
                lines.append((case, *shown, ratio))
        if lines:
            header = ("forward and backward", *names, "best of the others / featkd")
            text.append(f"{title}:\n\n{_table(header, lines)}\n")
    metrics = {"update": ".1f", "images_per_s": ".0f", "first_loss": ".3f", "last_loss": ".3f"}
    updates = [
        (case, *(f"{values['featkd', metric]:{digits}}" for metric, digits in metrics.items()))
        for case, values in parts.get("updates", {}).items()
    ]
    if updates:
        columns = ("update of the trainer", "ms", "images/s", "first loss", "last loss")
        text.append(_table(columns, updates) + "\n")
    launches = [
        (variant, f"{value:.1f}")
        for values in parts.get("launches", {}).values()
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
