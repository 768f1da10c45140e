"""Encoding and decoding of rows: exact, or within the documented error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featkd.cache import CacheConfig, TeacherOutputs
from featkd.cache.rows import NotStorable
from tests.cache.made import CHANNELS, CLASSES, FULL, LOWRANK, SHAPE, TOKENS, outputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_maps_and_all_logits_are_restored_bit_for_bit(dtype):
    kind = getattr(torch, dtype)
    given = outputs(7)
    given = TeacherOutputs(given.logits.to(kind), [given.maps[0].to(kind)])
    store = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    layout = replace(FULL, logits_dtype=dtype, store=store, layers=(replace(SHAPE, dtype=dtype),))
    logits, (x,) = layout.decode(layout.encode(given), [1])
    assert (logits.dtype, x.dtype) == (kind, kind)
    assert torch.equal(logits, given.logits)
    assert torch.equal(x, given.maps[0])


@pytest.mark.parametrize(("store", "digits"), [("fp16", 11), ("bf16", 8), ("int8", None)])
def test_whole_maps_are_rounded_once(store, digits):
    """Large values too: fp16 and int8 have a scale per channel."""
    given = outputs(7)
    x = given.maps[0] * 1e6
    layout = replace(FULL, store=store)
    _, (found,) = layout.decode(layout.encode(given._replace(maps=[x])), [1])
    assert found.dtype == torch.float32
    largest = x.abs().amax(1, keepdim=True)
    error = largest / 254 if digits is None else 2.0**-digits * x.abs() + 2.0**-38 * largest
    assert ((found - x).abs() <= error * (1 + 1e-6)).all()
    assert not torch.equal(found, x)


@pytest.mark.parametrize("top", range(1, CLASSES))
def test_the_remaining_probability_is_spread_evenly(top):
    layout = replace(FULL, logits_top=top)
    logits = torch.cat((outputs(7).logits, torch.tensor([[90.0, 0.0, -3.0, -90.0]])))
    given = TeacherOutputs(
        logits, [torch.cat((outputs(7).maps[0], torch.zeros(1, TOKENS, CHANNELS)))]
    )
    found = layout.decode(layout.encode(given), []).logits
    want = logits.double().softmax(1)
    log_probs, classes = logits.double().log_softmax(1).topk(top)
    rest = (1 - want.gather(1, classes).sum(1)) / (CLASSES - top)
    torch.testing.assert_close(found.gather(1, classes).double(), log_probs, rtol=2**-11, atol=1e-7)
    others = found.softmax(1).scatter(1, classes, 0).double()
    even = rest[:, None].expand(-1, CLASSES).scatter(1, classes, 0)
    torch.testing.assert_close(others, even, rtol=0.01, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(8), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("store", "error"), [("fp16", 1e-3), ("int8", 0.02)])
def test_factors_keep_the_energy_with_the_smallest_rank(store, error, dtype):
    layout = replace(LOWRANK, store=store, layers=(replace(SHAPE, dtype=dtype),))
    (x,) = outputs(9).maps
    x[4] = 0
    rows = layout.encode(TeacherOutputs(outputs(9).logits, [x]))
    ranks = {len(row["features.1.left_scales"]) for row in rows}
    assert len(ranks) > 2
    assert len(rows[4]["features.1.left_scales"]) == 0
    _, (found,) = layout.decode(rows, [1])
    assert found.dtype == getattr(torch, dtype)
    for restored, row in zip(found.double(), rows, strict=True):
        left, right = (
            row[f"features.1.{part}"].reshape(size, -1).double() * row[f"features.1.{part}_scales"]
            for part, size in (("left", TOKENS), ("right", CHANNELS))
        )
        eps = torch.finfo(found.dtype).eps
        torch.testing.assert_close(restored, left @ right.mT, rtol=eps, atol=1e-6)
    left_out = (found - x).square().sum((1, 2)) / x.square().sum((1, 2)).clamp(min=1e-30)
    assert (left_out <= 0.1 + error).all()
    assert left_out.max() > 0.03
    _, (nothing,) = layout.decode(rows[4:5], [1])
    assert torch.equal(nothing, torch.zeros(1, TOKENS, CHANNELS, dtype=found.dtype))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: t.logits[2].fill_(torch.nan), "logits is not finite"),
        (lambda t: t.maps[0][2, 0, 0].fill_(torch.inf), "the map of layer 1 is not finite"),
    ],
)
def test_values_that_are_not_finite_are_named(change, cause):
    given = outputs(4)
    change(given)
    with pytest.raises(NotStorable, match=cause) as caught:
        replace(FULL, store="fp16").encode(given)
    assert caught.value.index == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views: expected >= 1, got 0"),
        ({"shard_rows": 0}, "shard_rows: expected >= 1"),
        ({"features": "half"}, "features: expected one of none, full, lowrank; got 'half'"),
        ({"energy": 1.5}, r"energy: .*1\.5"),
        ({"energy": 0.9, "rank": 2}, "energy, rank: expected only one of them"),
        ({"features": "full", "rank": 2}, "rank: 2 needs features: lowrank, got full"),
        ({"features": "full", "store": "int4"}, "store: expected fp32 or bf16 or fp16 or int8 for"),
        ({"features": "lowrank", "store": "fp32"}, "store: expected fp16 or int8 for features: "),
        ({"features": "none", "store": "fp16"}, "store: expected nothing for features: none"),
        ({"logits_top": 5}, "logits_top: expected 1 to 4, the teacher's classes"),
        ({"logits_top": 0}, "logits_top: expected 1 to 4"),
        (
            {"features": "lowrank", "rank": 6},
            "rank: expected 1 to 5, the lesser of the 6 tokens and 5 channels of layer",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**options).resolved(True).layout(CLASSES, "float32", (SHAPE,))


def test_defaults_follow_the_loss():
    config = CacheConfig()
    assert config.resolved(False).layout(CLASSES, "float32", ()).features == "none"
    layout = config.resolved(True).layout(CLASSES, "float32", (SHAPE,))
    assert (layout.features, layout.energy, layout.store) == ("full", None, "int8")
    lowrank = CacheConfig(features="lowrank").resolved(True)
    assert (lowrank.energy, lowrank.store) == (0.99, "int8")
    assert layout.logits_top is None
    for compares_maps, top in ((True, None), (False, 10)):
        found = config.resolved(compares_maps).layout(1000, "float32", ())
        assert found.logits_top == top


def test_log_probabilities_below_fp16s_range_stay_finite():
    """Also the rest's, and those that overflow in float64."""
    layout = replace(FULL, logits_top=3, features="none", layers=())
    logits = torch.tensor(
        [[0.0, -7e4, -1e5, -2e5], [0.0, -65510.0, -65530.0, -7e4], [3e38, 0.0, -1.0, -3e38]]
    )
    rows = layout.encode(TeacherOutputs(logits, []))
    stored = torch.stack([row["logits.log_probs"] for row in rows])
    assert stored.dtype == torch.float16
    assert stored.isfinite().all()
    found = layout.decode(rows, []).logits
    assert found.isfinite().all()
    assert torch.equal(found.argmax(1), logits.argmax(1))
    probabilities = found.softmax(1)
    assert torch.equal(probabilities, logits.softmax(1))
    assert not (probabilities * found.log_softmax(1)).isnan().any()


def test_maps_beyond_a_narrower_dtypes_range_stay_finite():
    """bf16's largest value is below float32's; "fp32" may hold a float64 map."""
    most = torch.finfo(torch.float32).max
    for store, kind, x in (("bf16", torch.float32, most), ("fp32", torch.float64, 1e300)):
        layout = replace(FULL, store=store, layers=(replace(SHAPE, dtype="float32"),))
        given = torch.full((2, TOKENS, CHANNELS), x, dtype=kind)
        given[:, 0] *= -1
        _, (found,) = layout.decode(layout.encode(TeacherOutputs(outputs(2).logits, [given])), [1])
        assert found.isfinite().all()
        assert torch.equal(found.sign(), given.sign().float())
        assert found.abs().min() >= 0.99 * most


@pytest.mark.parametrize(
    "layout", [replace(FULL, store="int8"), replace(FULL, store="fp16"), LOWRANK]
)
def test_maps_that_no_scale_can_hold_name_the_image(layout):
    maps = outputs(3).maps[0]
    maps[2, 1] = 3e38
    with pytest.raises(NotStorable, match="the map of layer 1 has values above") as raised:
        layout.encode(TeacherOutputs(outputs(3).logits, [maps]))
    assert raised.value.index == 2
