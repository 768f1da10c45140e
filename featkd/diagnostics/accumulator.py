"""Base class of the accumulators: merging, and states to resume from."""

from __future__ import annotations

from typing import Any


class Accumulator:
    """Sums over images. Subclasses name the attributes that make up their state in `_parts`.

    A part is an accumulator, a count, a list, or a value that `merge` leaves as it is.
    """

    _parts: tuple[str, ...] = ()
    _shape: tuple[int, ...] | None = None  # of all that is added; None before

    def _keep_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Records the shape of the first addition; raises ValueError if a later one differs."""
        if self._shape not in (None, shape):
            raise ValueError(f"{name}: expected shape {self._shape} as before, got {shape}")
        self._shape = shape

    def merge(self, other: Any) -> None:
        """Adds the images of an accumulator with the same settings; no image may be in both."""
        if other._shape is None:
            return
        self._keep_shape("other", other._shape)
        for name in self._parts:
            part, more = getattr(self, name), getattr(other, name)
            if isinstance(part, Accumulator):
                part.merge(more)
            elif isinstance(part, (int, list)):
                setattr(self, name, part + more)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which torch.load(weights_only=True) accepts."""
        state: dict[str, Any] = {"shape": self._shape}
        for name in self._parts:
            part = getattr(self, name)
            is_nested = isinstance(part, Accumulator)
            state[name.removeprefix("_")] = part.state_dict() if is_nested else part
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of the same settings."""
        self._shape = state["shape"]
        for name in self._parts:
            part, value = getattr(self, name), state[name.removeprefix("_")]
            if isinstance(part, Accumulator):
                part.load_state_dict(value)
            else:
                setattr(self, name, value)
