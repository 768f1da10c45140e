"""The fused CPU paths, one file an op: a few images at a time, through BLAS, in reused memory."""
