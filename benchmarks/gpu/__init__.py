"""`make gpu`: everything that only a GPU can tell, in one run of at most ten minutes.

    python -m benchmarks.gpu            from the folder of the checkout; with no GPU it exits with 2
    python -m benchmarks.gpu --cpu-parts
    python -m benchmarks.gpu --into docs/results.md gpu-results/NAME.json

The parts run in processes of their own, so that one that fails or hangs leaves the others alone.
The process that starts them imports nothing but the standard library; nothing is installed, and
nothing is asked of the internet. No part of the wheel.
"""
