"""Options under which a model or optimizer fails are the user's mistake: one line, exit code 2."""

from __future__ import annotations

import re

import pytest
import torch

from featkd.cli.main import main
from featkd.train.recipe import RecipeError
from featkd.train.teacher import naming

SIZE = "fails on an image of data.img_size 16: AssertionError: Input height"
COMMANDS = {"distill": ["distill"], "dry run": ["distill", "--dry-run"], "cache": ["cache"]}
OPTIONS = {
    "teacher.std: expected numbers > 0, got ": ("--teacher.std", "[0.5,0,0.5]"),
    "teacher.img_size: 30 is not a multiple of the patch size 4": ("--teacher.img_size", "30"),
    "loss.pooled.weight: expected a finite number > 0": ("--loss.pooled.weight", "0"),
    "student.options: .*the student " + SIZE: ("--student.options.img_size", "64"),
    "teacher: ZeroDivisionError: ": ("--teacher.options.num_heads", "0"),
    "student: .*num_heads=7.*timm can.t build .* divisible by num_heads": (
        "--student.options.num_heads",
        "7",
    ),
}


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command fails with."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("message", OPTIONS)
def test_options_that_a_model_fails_under_are_named(
    recipe_file, tmp_path, capsys, command, message
):
    name, *more = COMMANDS[command]
    out = tmp_path / "out"
    error = failed(capsys, name, recipe_file, *more, "--out", out, *OPTIONS[message])
    assert re.match(f"featkd: {message}", error), error
    assert not out.exists()


def test_without_a_teacher_the_student_is_tried_too(recipe_file, tmp_path, capsys):
    words = ("--teacher", "null", "--loss.alpha", 0, "--loss.feature", "null")
    words += ("--student.arch", "plain", "--student.options.img_size", "64")
    error = failed(capsys, "distill", recipe_file, "--out", tmp_path / "out", *words)
    assert re.match("featkd: student.options: .*the student " + SIZE, error), error


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_an_optimizer_that_no_update_can_use_is_named(recipe_file, tmp_path, capsys, more):
    """AdaHessian needs a second derivative, which only its first update shows."""
    words = ("--out", tmp_path / "out", "--optim.optimizer", "adahessian", *more)
    error = failed(capsys, "distill", recipe_file, *words)
    assert "optim.optimizer: 'adahessian' can't be used: RuntimeError: " in error


@pytest.mark.parametrize(
    "error",
    [OSError("no such file"), torch.OutOfMemoryError("out of memory"), MemoryError()],
    ids=["file", "device memory", "memory"],
)
def test_other_causes_are_not_blamed_on_a_field(error):
    with pytest.raises(type(error)), naming("student"):
        raise error


def test_an_error_of_many_lines_is_one_line():
    with pytest.raises(RecipeError, match=r"^student: KeyError: 'a'$"), naming("student"):
        raise KeyError("a")
    message = r"^student: AssertionError: no message$"
    with pytest.raises(RecipeError, match=message), naming("student"):
        raise AssertionError
    with pytest.raises(RecipeError, match=r"^student: first$"), naming("student"):
        raise ValueError("first\nsecond")
