"""Leaves: what every floor may use, and what uses nothing of this package."""
