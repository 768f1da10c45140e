"""Arguments that public functions reject, propagate, or pass to the reference backend."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import featkd
from featkd.functional import lift_head, projected_feature_kd, soft_kd, widelast_projection
from featkd.kernels.launch import redirect
from featkd.losses import PooledFeatureKD, ProjectedFeatureKD
from featkd.ops import backends
from featkd.runtime import checks

FUNCTIONS = {f.__name__: f for f in (projected_feature_kd, widelast_projection, lift_head, soft_kd)}
MAPS = {"projected_feature_kd": "student", "widelast_projection": "x", "lift_head": "features"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def arguments(name: str) -> dict[str, Any]:
    """Valid arguments, with every tensor that the function accepts."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "soft_kd":
        logits = {"student_logits": randn(2, 5), "teacher_logits": randn(2, 5)}
        return {**logits, "target": randn(2, 5).softmax(1), "alpha": 0.5, "tau": 2.0}
    maps = {MAPS[name]: randn(2, 4, 3), "weight": randn(6, 3)}
    if name == "widelast_projection":
        norms = ("proj_norm_weight", "proj_norm_bias", "norm1_weight", "norm1_bias")
        return {**maps, **{norm: randn(6) for norm in norms}, "eps": 1e-3}
    norm = {"norm_weight": randn(6), "norm_bias": randn(6)}
    bias = {"bias": randn(6)} if name == "projected_feature_kd" else {}
    options = {"eps": 1e-3, "metric": "spectral", "grid": (2, 2)}
    return {**maps, **bias, **norm, "teacher": randn(2, 4, 6), **options}


TENSORS = [
    (name, argument)
    for name in FUNCTIONS
    for argument, value in arguments(name).items()
    if isinstance(value, Tensor)
]
TEACHERS = {name: argument for name, argument in TENSORS if argument.startswith("teacher")}


def call(name: str, **changes: Any) -> tuple[Tensor, ...]:
    found = FUNCTIONS[name](**{**arguments(name), **changes})  # type: ignore[operator]
    return found if isinstance(found, tuple) else (found,)


def fails(error: type[Exception], message: str, name: str, **changes: Any) -> None:
    """Checks that a call raises an error whose message matches."""
    with pytest.raises(error, match=message):
        call(name, **changes)


each_tensor = pytest.mark.parametrize(("name", "argument"), TENSORS)
each_loss_of_maps = pytest.mark.parametrize("name", ["projected_feature_kd", "lift_head"])


@each_tensor
def test_non_tensors_and_other_dtypes_raise(name, argument):
    value = arguments(name)[argument]
    for other in (value.tolist(), value.numpy()):
        message = f"{argument}: expected a torch.Tensor, got {type(other).__name__}"
        fails(TypeError, message, name, **{argument: other})
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        message = f"{argument}: expected a floating-point tensor, got {dtype}"
        fails(TypeError, message, name, **{argument: value.to(dtype)})


@each_tensor
def test_wrong_shape_raises(name, argument):
    value = arguments(name)[argument]
    wrong = [value[..., None], value[0]]
    if argument != next(iter(arguments(name))):  # the first argument defines the sizes
        wrong += [torch.cat((value, value[..., :1]), -1), torch.cat((value, value[:1]))]
    if argument == "weight":
        wrong.pop()  # its rows define the width of the others
    if argument == "target":
        wrong[1] = value.sum()
    for x in wrong:
        got = ", ".join(map(str, x.shape)) + ("," if x.dim() == 1 else "")
        message = rf"^{argument}: expected shape \(.+\).*, got \({got}\)"
        fails(ValueError, message, name, **{argument: x})


@pytest.mark.parametrize("most", ["cpu", "meta"])
@each_tensor
def test_different_devices_raise(name, argument, most):
    """The error lists the device of each tensor."""
    given = {key: x.to(most) if isinstance(x, Tensor) else x for key, x in arguments(name).items()}
    other = {"cpu": "meta", "meta": "cpu"}[most]
    given[argument] = torch.empty_like(given[argument], device=other)
    with pytest.raises(ValueError, match=f"must be on one device, got .*{argument} on {other}"):
        FUNCTIONS[name](**given)


@pytest.mark.parametrize(("name", "argument"), TEACHERS.items())
def test_teacher_requiring_grad_raises(name, argument):
    teacher = arguments(name)[argument].requires_grad_()
    message = f"{argument}: requires grad, .*no_grad.*{argument}.detach"
    fails(ValueError, message, name, **{argument: teacher})
    with torch.no_grad():  # no gradient is lost
        assert torch.equal(call(name, **{argument: teacher})[-1], call(name)[-1])


LOGITS = ("student_logits", "teacher_logits", "target")
NO_CHANNELS = {"teacher": (2, 4, 0), "weight": (0, 3), "norm_weight": (0,), "norm_bias": (0,)}


@pytest.mark.parametrize(
    ("name", "changes", "argument"),
    [
        ("projected_feature_kd", {"student": (0, 4, 3), "teacher": (0, 4, 6)}, "student"),
        ("projected_feature_kd", {"student": (2, 0, 3), "teacher": (2, 0, 6)}, "student"),
        ("projected_feature_kd", {"student": (2, 4, 0), "weight": (6, 0)}, "student"),
        ("lift_head", {"features": (0, 4, 3), "teacher": (0, 4, 6)}, "features"),
        ("lift_head", {"features": (2, 0, 3), "teacher": (2, 0, 6)}, "features"),
        ("soft_kd", dict.fromkeys(LOGITS, (0, 5)), "student_logits"),
        ("soft_kd", dict.fromkeys(LOGITS, (2, 0)), "student_logits"),
        ("projected_feature_kd", NO_CHANNELS | {"bias": (0,)}, "teacher"),
        ("lift_head", NO_CHANNELS, "teacher"),
    ],
)
def test_mean_over_no_elements_raises(name, changes, argument):
    empty = {key: torch.zeros(shape) for key, shape in changes.items()}
    shape = ", ".join(map(str, changes[argument]))
    fails(ValueError, rf"{argument}: has no elements \(shape \({shape}\)\)", name, **empty)


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, x) for name in FUNCTIONS for x in ("eps", "alpha", "tau") if x in arguments(name)],
)
def test_bad_numbers_raise(name, argument):
    allowed = {"alpha": "a number from 0 to 1"}.get(argument, "a finite number > 0")
    for wrong in ("0.5", None, torch.tensor(0.5), 1j):
        fails(TypeError, f"{argument}: expected {allowed}, got", name, **{argument: wrong})
    for wrong in (-1, math.nan, math.inf, -math.inf):
        fails(ValueError, f"{argument}: expected {allowed}, got {wrong}", name, **{argument: wrong})
    call(name, **{argument: np.float32(0.5)})


@each_loss_of_maps
@pytest.mark.parametrize("metric", ["mse", "spectral"])
def test_bad_grids_raise(name, metric):
    for wrong in ((2, 3), (0, 4), (-2, -2), (5, 1)):
        message = rf"grid: \({wrong[0]}, {wrong[1]}\) has .* have 4 tokens; expected .* == 4"
        fails(ValueError, message, name, metric=metric, grid=wrong)
    for malformed in (4, (4,), (2, 2, 1), (2.0, 2.0), "22"):
        message = "grid: expected None or a pair of ints"
        fails(TypeError, message, name, metric=metric, grid=malformed)
    for right in ((4, 1), [2, 2], torch.Size((1, 4)), (np.int64(2), np.int64(2)), None):
        assert call(name, metric=metric, grid=right)[-1].isfinite()


@each_loss_of_maps
def test_bad_metric_or_missing_grid_raises(name):
    for wrong in ("l1", "MSE", None, 2):
        message = f"metric: expected one of mse, spectral; got {wrong!r}"
        fails(ValueError, message, name, metric=wrong)
    maps = {MAPS[name]: torch.zeros(2, 6, 3), "teacher": torch.zeros(2, 6, 6)}
    message = r"grid: 6 tokens do not form a square; pass grid=\(H, W\)"
    fails(ValueError, message, name, **maps, grid=None)


def test_widths_of_a_projector_below_one_raise():
    for kind in (ProjectedFeatureKD, PooledFeatureKD):
        for wrong, error in ((0, ValueError), (-1, ValueError), ("8", TypeError), (8.0, TypeError)):
            for widths, name in (((wrong, 8), "student_dim"), ((8, wrong), "teacher_dim")):
                with pytest.raises(error, match=f"{name}: expected a whole number >= 1, got"):
                    kind(*widths)


def test_incomplete_arguments_raise():
    no_projector = dict.fromkeys(("weight", "bias", "norm_weight", "norm_bias"))
    for changes, message in (
        ({"bias": torch.zeros(3)}, "bias: given without weight"),
        ({"norm_bias": torch.zeros(3)}, "norm_bias: given without norm_weight"),
        ({"teacher": torch.zeros(2, 4, 6)}, r"expected shape \(2, 4, 3\), got \(2, 4, 6\)"),
    ):
        changes = {**no_projector, "teacher": torch.zeros(2, 4, 3), **changes}
        fails(ValueError, message, "projected_feature_kd", **changes)
    fails(ValueError, "teacher_logits: None, but alpha is 0.5", "soft_kd", teacher_logits=None)
    for name, argument in TENSORS:
        if name in ("lift_head", "widelast_projection") and argument != "teacher":
            message = f"{argument}: expected a torch.Tensor, got None"  # the norm is required
            fails(TypeError, message, name, **{argument: None})


def test_swapped_maps_raise():
    student, teacher, weight = torch.zeros(2, 4, 3), torch.zeros(2, 4, 6), torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"^student, teacher: .*the two maps are swapped"):
        projected_feature_kd(teacher, student, weight)
    with pytest.raises(ValueError, match=r"^student: expected shape|^weight: expected shape"):
        projected_feature_kd(torch.zeros(2, 4, 5), teacher, weight)


@pytest.mark.parametrize(
    ("tokens", "options", "warns"),
    [
        (197, {}, True),
        (17, {}, True),
        (196, {}, False),  # a square patch grid
        (10, {"grid": (2, 5)}, False),  # a given grid
        (12, {}, False),
        (2, {}, False),
    ],
)
def test_class_token_warns_once(tokens, options, warns, monkeypatch):
    monkeypatch.setattr(checks, "_warned_of", set())
    maps = torch.zeros(2, tokens, 3), torch.ones(2, tokens, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            projected_feature_kd(*maps, **options)
        compiled = torch.compile(projected_feature_kd, backend="eager", fullgraph=True)
        compiled(*maps, **options)
    found = [w for w in caught if "class token" in str(w.message)]
    assert len(found) == warns
    if warns:
        assert f"{tokens} = " in str(found[0].message)
        assert found[0].filename == __file__


def test_empty_batches():
    residual, normed = call("widelast_projection", x=torch.zeros(0, 4, 3))
    assert residual.shape == normed.shape == (0, 4, 6)
    for backend in ("auto", "triton"):
        with featkd.use_backend(backend):
            pooled, loss = call("lift_head", features=torch.zeros(0, 4, 3), teacher=None)
        assert (pooled.shape, loss) == ((0, 6), None)
    no_tokens = {"features": torch.zeros(2, 0, 3), "teacher": None}
    fails(ValueError, "^features: has no elements", "lift_head", **no_tokens)


def test_bad_class_indices_raise():
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.int32)):
        message = f"target: class indices must be int64, got {wrong.dtype}"
        fails(TypeError, message, "soft_kd", target=wrong)
    three = torch.zeros(3, dtype=torch.int64)
    fails(ValueError, r"target: expected shape \(2\), got \(3,\)", "soft_kd", target=three)
    shapes = r"target: expected shape \(2\) for class indices or \(2, 5\) for soft labels, got \(\)"
    fails(ValueError, shapes, "soft_kd", target=torch.tensor(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@each_tensor
def test_nan_and_inf_propagate(name, argument, bad):
    value = arguments(name)[argument].clone()
    value.view(-1)[1] = bad
    assert not all(x.isfinite().all() for x in call(name, **{argument: value}))


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("own", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_mixed_dtypes(name, own, other):
    """Tensors are not rounded to each other's dtype; gradients have the dtype of their tensor."""
    first = next(iter(arguments(name)))
    constant = (*TEACHERS.values(), "target")
    given, exact = arguments(name), arguments(name)
    for key, x in given.items():
        if isinstance(x, Tensor):
            given[key] = x.to(own if key == first else other).requires_grad_(key not in constant)
            exact[key] = given[key].detach().double()
    got = call(name, **given)
    if "weight" in given and own.itemsize == 2:  # torch computes the matmul in this dtype
        rows = F.linear(given[first], *(given[n].to(own) for n in ("weight", "bias") if n in given))
        exact[first] = rows.detach().double()
        exact["weight"] = torch.eye(6, dtype=torch.float64)
        if "bias" in given:
            exact["bias"] = torch.zeros(6, dtype=torch.float64)
    for mine, theirs in zip(got, call(name, **exact), strict=True):
        if mine.dim() == 0:
            assert mine.dtype == torch.promote_types(own, torch.float32)
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=0)
        else:
            assert mine.dtype == own
            rounding = {"rtol": torch.finfo(own).eps, "atol": 1e-5}
            torch.testing.assert_close(mine.double(), theirs, **rounding)
    sum(x.double().sum() for x in got).backward()
    for key, x in given.items():
        if isinstance(x, Tensor) and key not in constant:
            assert x.grad.dtype == x.dtype, key


def refuse(*_: Any) -> None:
    raise AssertionError("a kernel was launched")


def test_unsupported_by_kernels_uses_reference_with_one_warning(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    given = (torch.ones(1, 129, 2), torch.zeros(1, 129, 2))
    options = {"metric": "spectral", "grid": (1, 129)}
    why = "a patch grid of 129 columns, more than 128"
    with redirect(refuse), featkd.use_backend("triton"):  # pretends that there is a GPU
        message = f"featkd.projected_feature_kd runs on the reference backend: {why}"
        with pytest.warns(UserWarning, match=message) as caught:
            loss = projected_feature_kd(*given, **options)
        assert [warning.filename for warning in caught] == [__file__]
        assert featkd.last_backend("projected_feature_kd") == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            projected_feature_kd(*given, **options)
            projected_feature_kd(*given, **options)
    with featkd.use_backend("reference"):
        assert torch.equal(loss, projected_feature_kd(*given, **options))


@pytest.mark.parametrize(
    ("name", "argument"),
    [(n, x) for n, x in TENSORS if x not in (next(iter(arguments(n))), "weight", "bias")],
)
def test_float8_uses_reference(name, argument, monkeypatch):
    """Tests each tensor that a kernel reads; torch's linear layer reads the others."""
    monkeypatch.setattr(backends, "_warned", set())
    value = arguments(name)[argument].to(torch.float8_e4m3fn)
    with redirect(refuse), featkd.use_backend("triton"):  # pretends that there is a GPU
        message = f"{name} runs on the reference .* in torch.float8_e4m3fn"
        with pytest.warns(UserWarning, match=message):
            got = call(name, **{argument: value})
    assert featkd.last_backend(name) == "reference"
    for ours, exact in zip(got, call(name, **{argument: value.float()}), strict=True):
        torch.testing.assert_close(ours, exact)


def test_widest_supported_grid_uses_kernel():
    maps = torch.ones(1, 128, 2), torch.zeros(1, 128, 2)
    launched = pytest.raises(AssertionError, match="a kernel was launched")
    with redirect(refuse), featkd.use_backend("triton"), launched:
        projected_feature_kd(*maps, metric="spectral", grid=(1, 128))
