"""Checks that timm can download pretrained weights, before it retries for a minute."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
from timm.models import get_pretrained_cfg, parse_model_name

_FILES = ("model.safetensors", "pytorch_model.bin")
_TIMEOUT = 5  # seconds


def is_on_hub(name: str) -> bool:
    """Checks whether a model's name has the source "hf-hub:", whose configuration is remote too."""
    return bool(parse_model_name(name)[0] == "hf-hub")


def check_download(name: str, pretrained: bool = True) -> None:
    """Raises an error if the files of a timm model are on no disk and their host is unreachable.

    Without `pretrained`, only the configuration of a model on the Hugging Face Hub is needed.

    Behind a proxy nothing is checked.

    Raises:
        ConnectionError: the host can't be reached.
        ValueError: timm has no pretrained weights for this model.
    """
    source, place = parse_model_name(name)
    if source == "local-dir":
        return
    repository: str | None = place.partition("@")[0]  # without a revision
    if source is None:
        record = get_pretrained_cfg(name)
        if record is None or not record.has_weights:
            raise ValueError(
                f"pretrained: timm has no weights for {name!r}; expected pretrained: false with a "
                "checkpoint, or a model with weights"
            )
        repository = None if record.file else record.hf_hub_id
    if not repository or getproxies() or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    files = _FILES if pretrained else ("config.json",)
    cached = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
    if any(isinstance(path, str) for path in cached):
        return
    host = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname or "", port), timeout=_TIMEOUT).close()
    except OSError as error:
        raise unreachable(name, error) from error


def unreachable(name: str, error: Exception) -> ConnectionError:
    """Returns the error of weights that can't be downloaded."""
    return ConnectionError(
        f"pretrained: the weights of {name!r} can't be downloaded from "
        f"{huggingface_hub.constants.ENDPOINT} ({error}); download them elsewhere and give the "
        "file as --checkpoint without --pretrained, in a recipe as teacher.checkpoint or "
        "student.checkpoint with pretrained: false (and teacher.mean and teacher.std if they are "
        "not those of data), or give a folder with config.json as 'local-dir:FOLDER'"
    )
