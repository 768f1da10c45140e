"""Benchmarks of featkd against eager torch and torch.compile.

- one file per op: its problems, in plain torch and in featkd
- cases, variants, timing, run: `featkd bench run`
- results, table, plot, compare: its rows on disk, and the commands that read them
- loader, step: `featkd bench loader` and `step`
- spectrum: `featkd.linalg` against torch and numpy
- gpu/, report/: `make gpu` and `make report`, in a checkout only

Imports within this folder are relative: it is featkd.benchmarks if installed, and benchmarks in a
checkout.
"""
