"""The ops: one file each, with schema, autograd, and the choice of backend."""
