"""`pytest benchmarks --bench-shapes published ...`: which cases pytest-benchmark times."""

from __future__ import annotations

import os

import pytest

from featkd.runtime import openmp

openmp.set_defaults()  # before torch is loaded, as `featkd bench` has it
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_DEFAULTS = {"shapes": "small", "dtypes": "fp32", "directions": "forward,both"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("featkd benchmarks")
    for name, default in _DEFAULTS.items():
        text = f"as `featkd bench run --{name}`, comma-separated (default: {default})"
        group.addoption(f"--bench-{name}", default=default, help=text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "variant"} <= set(metafunc.fixturenames):
        return
    from .cases import OPS, select
    from .variants import VARIANTS

    # the default where these options were not added: this file isn't below a given path then
    shapes, dtypes, directions = (
        str(metafunc.config.getoption(f"--bench-{name}", default))
        for name, default in _DEFAULTS.items()
    )
    try:
        cases = select(tuple(OPS), shapes, dtypes.split(","), directions.split(","))
    except ValueError as error:
        raise pytest.UsageError(f"--bench-{error}") from None
    metafunc.parametrize("case", cases, ids=lambda case: case.name)
    metafunc.parametrize("variant", VARIANTS)
