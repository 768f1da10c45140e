"""Image loading by NVIDIA DALI."""
