"""`featkd compare`: trains students that differ in one thing, over several seeds."""

from featkd.compare.run import compare

__all__ = ["compare"]
