"""Maps in bf16 are multiplied in float32 here, as on processors that don't multiply in bf16."""

from __future__ import annotations

import pytest

from featkd.cpu import chunks


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test compares the same on every machine; test_bf16_products has the other way."""
    monkeypatch.setattr(chunks, "multiplies_bf16", lambda device: False)
