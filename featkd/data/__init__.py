"""Image loading from class folders or tar shards, reproducible on any machine.

>>> from featkd.data import DataConfig, build_loader
>>> config = DataConfig(path="/data/imagenet", workers=8)
>>> loader = build_loader(config, split="train", batch_size=512, seed=0)  # doctest: +SKIP
"""

from featkd.data.augment import build_transform
from featkd.data.config import AugmentConfig, DataConfig
from featkd.data.factory import build_loader
from featkd.data.images import BadImageError, read_image
from featkd.data.imageset import ImageSet
from featkd.data.loader import Batch, Loader
from featkd.data.mixing import Mixer
from featkd.data.sampler import EpochSampler, SampleKey

__all__ = [
    "AugmentConfig",
    "BadImageError",
    "Batch",
    "DataConfig",
    "EpochSampler",
    "ImageSet",
    "Loader",
    "Mixer",
    "SampleKey",
    "build_loader",
    "build_transform",
    "read_image",
]
