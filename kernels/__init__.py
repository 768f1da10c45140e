"""Triton row kernels: the ops between two matrix products, which cuBLAS computes.

Nothing here is imported before a CUDA tensor needs it.
"""
