"""The ops: one file each, with schema, autograd and choice of backend."""

from featkd.ops.compile_cache import tag_compile_cache

tag_compile_cache()
