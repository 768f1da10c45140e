"""The plot and the tables."""

from __future__ import annotations

import re

import pytest

from featkd.benchmarks import plot, table
from featkd.benchmarks.results import ResultsError


@pytest.fixture
def rows(all_variants):
    other = all_variants(op="lift_head", form="mse")
    return [*all_variants(), *all_variants(dtype="bf16"), *other]


def test_plot(tmp_path, rows):
    drawn = plot.draw(rows, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    for word in ("lift_head mse 32x1000", "fp32, both", "bf16, both", "featkd", "Some, CPU"):
        assert word in text
    name = "lift_head/mse/32x1000/fp32/both"
    assert (name, "compile", "time_to_eager", "ratio", 1 / 1.7) in drawn
    assert (name, "featkd", "peak_bytes", "bytes", 1_000_000) in drawn
    plot.draw(rows, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text
    plot.draw(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_mistakes(tmp_path, rows, make_row):
    with pytest.raises(ResultsError, match=r"out: expected a name that ends in .svg or .png"):
        plot.draw(rows, tmp_path / "p.jpg")
    with pytest.raises(ResultsError, match="no case in the results has a time of the eager"):
        plot.draw([make_row()], tmp_path / "p.svg")


def test_table(rows, make_row):
    alone = make_row(op="widelast_projection")  # not beside the others: no line
    *lines, empty, origin = table.markdown([*rows, alone]).splitlines()
    assert (len(lines), empty) == (2 + 3, "")
    assert origin == (
        "Some, CPU, AVX2, 2 threads, torch 2.14.1, featkd 0123456789, 2026-11-24, "
        "load average 2.0 to 2.0."
    )
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    first = [cell.strip() for cell in lines[2].split("|")]
    assert first[1] == "soft_kd/indices/32x1000/fp32/both"
    assert first[5] == "2 [1.9, 2.1]"
    assert first[6:8] == ["1.50", "**0.88**"]  # of eager's speed, and of the best compiled one's


def test_table_in_a_document(tmp_path, rows):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench mine -->\nold\n<!-- end bench mine -->\nafter\n")
    text = table.markdown(rows)
    for _ in range(2):
        table.write_into(page, "mine", text)
        assert (
            re.fullmatch(
                r"before\n<!-- bench mine -->\n\n(.*)\n<!-- end bench mine -->\nafter\n",
                page.read_text(),
                re.S,
            ).group(1)
            == text
        )  # type: ignore[union-attr]
    with pytest.raises(ResultsError, match="expected the lines '<!-- bench other -->'"):
        table.write_into(page, "other", text)
    with pytest.raises(FileNotFoundError, match="no document"):
        table.write_into(tmp_path / "none.md", "mine", text)


def test_pivot():
    """A metric that comes again begins a line, as the launches of one kernel do."""
    figures = [
        ("a", "x", "time", "us", 2.0),
        ("a", "x", "loads", "count", 3),
        ("a", "x", "time", "us", 4.0),
        ("b", "y", "loads", "count", 5),
    ]
    header, *lines = table.pivot("kernel", figures).splitlines()
    assert header.split() == ["kernel", "time,", "us", "loads"]
    assert [line.split() for line in lines] == [
        ["a", "x", "2", "3"],
        ["a", "x", "4"],
        ["b", "y", "5"],
    ]
