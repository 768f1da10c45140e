"""Triton row kernels: everything between two matrix products, which cuBLAS makes.

One file per op. Nothing here is imported before a CUDA tensor needs it.
"""
