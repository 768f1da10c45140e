"""Triton kernels, one file an op; nothing here is imported before a CUDA tensor needs it."""
