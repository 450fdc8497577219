"""Leaves: modules that every floor of the package may import, and that import nothing else of it."""
