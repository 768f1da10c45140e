"""Checks of every op on a GPU, against plain torch in float64; their logic runs on a CPU too.

`test_gpu.py` runs them under pytest, `python -m benchmarks.gpu` (`make gpu`) without it.
"""
