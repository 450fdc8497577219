"""The two-iteration scheme: which paths are dropped, and what learns."""
