"""The ops: one file each, with schema, autograd, and the choice of backend."""

from featkd.compile_cache import tell_ops_apart

tell_ops_apart()
