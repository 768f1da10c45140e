"""Teacher outputs on disk: written by `featkd cache`, read by `featkd distill --cache`."""

from featkd.cache.config import CacheConfig
from featkd.cache.manifest import CacheError, Manifest
from featkd.cache.reader import TeacherCache, verify_cache
from featkd.cache.rows import LayerShape, Layout, TeacherOutputs
from featkd.cache.writer import CacheWriter

__all__ = [
    "CacheConfig",
    "CacheError",
    "CacheWriter",
    "LayerShape",
    "Layout",
    "Manifest",
    "TeacherCache",
    "TeacherOutputs",
    "verify_cache",
]
