"""Residual paths: the modules that users build networks from, and how one call of a path is run as it was decided."""
