"""The first quarter of an hour on a new GPU: python -m kernels.first_run."""
