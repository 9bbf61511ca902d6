"""These tests need device-mapper, md and more: they run inside of ``tests/machines/guest.py``."""

from __future__ import annotations

import os

import pytest

from tests.machines.guest import IN_GUEST


def pytest_runtest_setup(item: pytest.Item) -> None:
    if IN_GUEST not in os.environ:
        pytest.skip("runs in a guest only: python -m tests.machines.guest tests/guest")
