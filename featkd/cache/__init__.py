"""A teacher's outputs on disk: computed once (`featkd cache`), read by `featkd distill --cache`."""

from featkd.cache.config import CacheConfig
from featkd.cache.manifest import CacheError, Manifest
from featkd.cache.reader import TeacherCache, damages
from featkd.cache.rows import LayerShape, Layout, Taught
from featkd.cache.writer import CacheWriter

__all__ = [
    "CacheConfig",
    "CacheError",
    "CacheWriter",
    "LayerShape",
    "Layout",
    "Manifest",
    "Taught",
    "TeacherCache",
    "damages",
]
