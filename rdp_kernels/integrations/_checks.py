"""Checks that several integrations share."""

from ..scheme.scheme import ResidualDropPath


def check_scheme(scheme: object) -> ResidualDropPath:
    if not isinstance(scheme, ResidualDropPath):
        raise TypeError(f"scheme must be a ResidualDropPath, got {type(scheme).__name__}")
    return scheme
