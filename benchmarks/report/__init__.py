"""Report of the compiled kernels: `make report`, or `python -m benchmarks.report` in a checkout.

It compiles every kernel ahead of time, counts what the kernels move and launch, and checks the
rules of docs/kernels.md. It needs no GPU, and is not part of the wheel.
"""
