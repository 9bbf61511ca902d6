"""VM tests are slow: ``IMAGER_VM_BUDGET`` (seconds) says when no further one is begun."""

from __future__ import annotations

import os
import time

import pytest

_STARTED = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = os.environ.get("IMAGER_VM_BUDGET")
    if budget and item.get_closest_marker("vm") and time.monotonic() - _STARTED > int(budget):
        pytest.skip(f"LEFT OUT: the time budget of {budget} s is used up")
