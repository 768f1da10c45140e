"""`make gpu`: all checks and measurements that need a GPU, in one run of at most ten minutes.

    python -m benchmarks.gpu            in the checkout's folder; exits with 2 if there is no GPU
    python -m benchmarks.gpu --cpu-parts
    python -m benchmarks.gpu --into docs/results.md gpu-results/NAME.json

Each part runs in separate processes: if one fails or hangs, the others continue. The process that
starts them imports only the standard library. Nothing is installed or downloaded. The folder is
not part of the wheel.
"""
