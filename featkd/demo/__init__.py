"""`featkd demo`: comparisons on the digits that ship with scikit-learn."""

from featkd.demo.run import run_demo

__all__ = ["run_demo"]
