"""Errors of stored logits: by hand at one form, in order over all, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from featkd.benchmarks import cached_logits


def test_an_error_by_hand():
    teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    held = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[0.5, 0.0, 1.0, 0.0]], requires_grad=True)
    loss, gradient = cached_logits._error(student, teacher, held, 2.0)
    log_probs = (student.detach() / 2).log_softmax(1)
    divergences = [
        4 * F.kl_div(log_probs, x, reduction="batchmean", log_target=True)
        for x in ((teacher / 2).log_softmax(1), (held / 2).log_softmax(1))
    ]
    assert loss == pytest.approx(float(divergences[1] / divergences[0]) - 1, rel=1e-5)
    right, found = (log_probs.exp() - (x / 2).softmax(1) for x in (teacher, held))
    assert gradient == pytest.approx(float((found - right).norm() / right.norm()), rel=1e-5)


def test_more_classes_are_more_exact_and_larger():
    forms = list(cached_logits.measure(classes=200, images=16))
    assert [name for name, *_ in forms] == ["all", "100", "50", "10", "5"]
    assert [size for _, size, _ in forms] == [800, 402, 202, 42, 22]
    for column in zip(*(errors for *_, errors in forms), strict=True):
        gradients = [error.gradient for error in column]
        assert gradients[0] == 0
        assert gradients == sorted(gradients)
        assert column[-1].loss < 0


def test_main(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cached_logits, "IMAGES", 8)
    document, figures = tmp_path / "sizes.md", tmp_path / "figures.json"
    document.write_text("<!-- bench cached-logits -->\n<!-- end bench cached-logits -->\n")
    cached_logits.main(["--out", str(document), "--json", str(figures)])
    assert "| 2.5 | 10 | 42 |" in document.read_text()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3 * len(cached_logits.TOPS)
    rows = json.loads(figures.read_text())["rows"]
    assert {row["metric"] for row in rows} == {"bytes", "loss_error", "student_gradient_error"}
