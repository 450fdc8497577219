"""Kernels say nothing while they start: one on the same machine needs no encryption."""

c = get_config()  # noqa: F821
c.IPKernelApp.log_level = "ERROR"
