"""Check whether DALI is installed and supports a configuration."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from featkd.data.augment_params import AugmentParamSampler
from featkd.data.config import DataConfig
from featkd.data.dali.randaugment import is_supported


def unsupported_reason(config: DataConfig, training: bool) -> str:
    """Returns the reason why `DaliLoader` cannot be used, "" if it can.

    Imports nvidia.dali if nothing else speaks against it.
    """
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "nvidia-dali is not installed"
    if training and config.augment.color_jitter is not None:
        return "data.augment.color_jitter is not supported by the DALI loader"
    names = AugmentParamSampler(config, 0).op_names if training else []
    if unknown := [name for name in names if not is_supported(name)]:
        return (
            f"data.augment.rand_augment: {', '.join(unknown)} of {config.augment.rand_augment!r} "
            "is not supported by the DALI loader"
        )
    try:  # last, because worker processes start more slowly once DALI is imported
        import_module("nvidia.dali")
    except Exception as error:  # a broken installation raises errors of any type
        return f"nvidia-dali can't be imported: {type(error).__name__}: {error}"
    return ""
