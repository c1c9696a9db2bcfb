"""Parameters of a test that `make test` leaves to `make nightly`: they share what others prove."""

from __future__ import annotations

from typing import Any

import pytest


def nightly(*values: Any) -> list[Any]:
    """Return the values as parameters that run at night only; a tuple is one test's arguments."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.nightly) for row in rows]
