"""Benchmarks of featkd's ops against eager torch and torch.compile: `featkd bench`.

One file an op, named as the op, says how its inputs look and how one writes it in plain torch;
`cases` lists them all, `run` measures them, `results` stores the rows that `plot`, `table` and
`compare` read. Imports inside this folder are relative: it is featkd.benchmarks when installed
and plain `benchmarks` to pytest and mypy.
"""
