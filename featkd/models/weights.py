"""Reads weight files without running code from them, and loads them strictly."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from featkd.runtime.names import listed
from featkd.runtime.remote import AnyPath, Location, locate, seekable
from featkd.runtime.scores import rank

Weights = Literal["auto", "model", "model_ema"]

_EMA_KEYS = ("model_ema", "state_dict_ema")
_MODEL_KEYS = ("model", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # of DDP and timm's ModelEma, and of torch.compile


class CheckpointMismatch(ValueError):
    """The tensors of a file don't match those of a model."""


def read_state_dict(path: AnyPath, weights: Weights = "auto") -> dict[str, Tensor]:
    """Reads a state dict from a file, on the CPU.

    No code from the file is run: .safetensors contains none, and other files are read by
    torch.load with weights_only=True. Besides torch's own list only argparse.Namespace is allowed,
    in which DeiT's training scripts save their arguments.

    Args:
        path: a .safetensors file, or a file of torch.save with a plain state dict or a checkpoint:
            a dict with a state dict under "model" or "state_dict", and optionally an averaged one
            under "model_ema" or "state_dict_ema". A path, or a URL for fsspec.
        weights: "model_ema" for a checkpoint's averaged weights, "model" for the last ones.
            "auto" takes those with the better score if featkd wrote the file, otherwise the
            averaged ones if there are any.

    Returns:
        Name to tensor, without the prefixes ("module.") that wrappers add to every name.

    Raises:
        ValueError: the file is not a weight file, or lacks the requested `weights`.
        OSError: the file can't be read.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights: expected one of {get_args(Weights)}, got {weights!r}")
    where = locate(path, "checkpoint")
    content: Any
    if where.name.endswith(".safetensors"):
        try:
            content = (
                safetensors.torch.load_file(where)
                if isinstance(where, Path)
                else safetensors.torch.load(where.read_bytes())
            )
        except safetensors.SafetensorError as error:
            raise ValueError(f"checkpoint: {path} is not a safetensors file: {error}") from error
    else:
        content = _torch_load(where)
    state = choose_weights(content, weights, path)
    odd = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        what = f"holds more than tensors: {listed(odd, 3)}" if odd else "holds no tensor"
        raise ValueError(f"checkpoint: {path} {what}")
    return _unwrapped(state)


def read_stored_recipe(path: AnyPath) -> dict[str, Any]:
    """Reads the recipe in a checkpoint of featkd; returns {} for other files."""
    where = locate(path, "checkpoint")
    content = {} if where.name.endswith(".safetensors") else _torch_load(where)
    recipe = content.get("recipe") if isinstance(content, dict) else None
    return recipe if isinstance(recipe, dict) else {}


def load_strictly(
    model: nn.Module, state: Mapping[str, Tensor], path: AnyPath, model_name: str
) -> None:
    """Loads every tensor of `state` into `model`, or raises and loads none.

    Args:
        model: receives the weights.
        state: name to tensor.
        path: file that `state` was read from, for the error.
        model_name: name of the model, for the error.

    Raises:
        CheckpointMismatch: names are missing or unexpected, or shapes differ.
    """
    own = model.state_dict()
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": wrong,
    }
    if any(problems.values()):
        raise mismatch(path, model_name, problems)
    model.load_state_dict(state)


def mismatch(
    path: AnyPath, model_name: str, problems: Mapping[str, Sequence[str]]
) -> CheckpointMismatch:
    """Creates the error that lists, per kind of problem, the names that don't match."""
    parts = [f"{len(x)} {kind}: {listed(x, 3)}" for kind, x in problems.items() if x]
    return CheckpointMismatch(f"checkpoint: {path} does not fit {model_name}; {'; '.join(parts)}")


def _torch_load(path: Location) -> Any:
    source = seekable(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: {path} is not a weight file, or holds objects that can't be read without "
            "running code from it; save its state dict alone"
        ) from error
    except (EOFError, KeyError, RuntimeError) as error:  # KeyError: a text file
        raise ValueError(
            f"checkpoint: {path} is damaged or not a weight file: {type(error).__name__}: {error}"
        ) from error


def choose_weights(content: Any, weights: Weights, path: AnyPath) -> dict[str, Any]:
    """Selects a state dict from a file's content; see `read_state_dict`."""
    key = find_weights(content, weights, path)
    return dict(content if key is None else content[key])


def find_weights(content: Any, weights: Weights, path: AnyPath) -> str | None:
    """Returns the key of the state dict that `choose_weights` selects; None for the content."""
    if not isinstance(content, dict):
        raise ValueError(
            f"checkpoint: {path} holds a {type(content).__name__}, expected a dict of tensors"
        )
    inside = [key for key in (*_EMA_KEYS, *_MODEL_KEYS) if isinstance(content.get(key), Mapping)]
    # A long average over a short run is close to the initial weights, so scores decide if known.
    scores = content.get("scores")
    last_first = isinstance(scores, Mapping) and (
        rank(scores.get("model", {})) >= rank(scores.get("ema", {}))
    )
    both = (*_MODEL_KEYS, *_EMA_KEYS) if last_first else (*_EMA_KEYS, *_MODEL_KEYS)
    allowed = {"auto": both, "model_ema": _EMA_KEYS, "model": _MODEL_KEYS}
    for key in allowed[weights]:
        if key in inside:
            return key
    if inside or weights == "model_ema":
        found = ", ".join(inside) or "a plain state dict"
        raise ValueError(f"weights: {weights!r} is not in {path}, which holds {found}")
    return None


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes wrappers' prefixes, which are on *every* name; others are kept."""
    for prefix in _WRAPPERS * 2:  # a wrapper may hold the other
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
