"""The code of docs/export.md, for both kinds of students."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from featkd.models import create_student

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def page() -> dict[str, Any]:
    """Names that the first code block of the page defines."""
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[0], str(PAGE), "exec"), names)
    return names


@pytest.fixture
def make(tiny: dict[str, Any], perturb: Any) -> Callable[[str], Any]:
    """Function that returns a small student."""
    torch.manual_seed(0)
    options = {**tiny, "depth": 2}
    return lambda arch: perturb(create_student("deit_tiny_patch16_224", arch, 96, **options)).eval()


@pytest.mark.parametrize("arch", ["lift", "widelast"])
def test_exported_program_matches_model(
    page: dict[str, Any], make: Callable[[str], Any], arch: str
) -> None:
    student = make(arch)
    program = page["export_program"](student, torch.randn(2, 3, 32, 32))
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), student(images), rtol=1e-5, atol=1e-5)


def test_onnx_matches_model(
    page: dict[str, Any], make: Callable[[str], Any], tmp_path: Path
) -> None:
    student = make("widelast")  # the page exports a Lift student
    path = tmp_path / "student.onnx"
    page["export_onnx"](student, torch.randn(2, 3, 32, 32), path)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), student(images).detach(), rtol=1e-4, atol=1e-4
        )


def test_code_of_docs_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    exec(compile("\n".join(BLOCKS), str(PAGE), "exec"), {})
    assert (tmp_path / "student.onnx").exists()
