"""Engines for the museum."""

from tests.runtime.conftest import make_engine, text_engine

__all__ = ["make_engine", "text_engine"]
