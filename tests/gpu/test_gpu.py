"""The checks on a GPU. test_script.py runs small cases of them on a CPU, as parts of `make gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.recorder import NotHere
from featkd.ops import extension

from . import accuracy, batches, behaviour, decompositions
from .forms import FORMS, MAIN

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALL = (*behaviour.QUICK, *behaviour.COMPILED, *behaviour.LARGE)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.usefixtures("one_thread")


@on_gpu
@pytest.mark.parametrize("precision", accuracy.PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
def test_as_exact_as_eager(form: str, precision: str):
    for sizes in accuracy.sizes_of(FORMS[form]):
        accuracy.check(accuracy.Case(FORMS[form], sizes, precision), GPU)


@pytest.mark.parametrize("slip", ["output", "gradient", "scale"])
def test_a_wrong_result_is_noticed(slip: str):
    form = FORMS["lift_head/mse"]

    def wrong(x, sizes):
        pooled, loss = form.ours(x, sizes)
        slips = {
            "output": (pooled * 1.01, loss),
            "gradient": (pooled, loss.detach() + 0.9 * (loss - loss.detach())),
            "scale": (pooled, 1.001 * loss),
        }
        return slips[slip]

    sizes = accuracy.sizes_of(form, small=True)[0]
    with pytest.raises(AssertionError, match="error"):
        accuracy.check(accuracy.Case(replace(form, ours=wrong), sizes, "fp32"), CPU)


@on_gpu
@pytest.mark.parametrize("form", MAIN)
@pytest.mark.parametrize("check", ALL, ids=lambda c: c.__name__)
def test_behaviour(check: behaviour.Check, form: str):
    try:
        check(FORMS[form], GPU)
    except NotHere as error:
        pytest.skip(str(error))


@on_gpu
@pytest.mark.parametrize("check", batches.CHECKS, ids=lambda c: c.__name__)
def test_batches(check):
    check(GPU)


@on_gpu
@pytest.mark.parametrize("name", decompositions.cases())
def test_linalg(name: str):
    assert not extension.missing()
    assert extension.has_kernel("featkd::spectrum", "cuda"), "csrc is built without CUDA"
    decompositions.cases()[name](GPU)
