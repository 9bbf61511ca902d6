"""Maps of volume groups, mirrors and encrypted containers, under a kernel that can make them."""

from __future__ import annotations

import pytest

from imager.process import find_tool
from tests.machines.guest import run_in_guest

GUEST_SECONDS = 600
"""About 90 s on an idle machine of two cores, several times that on a loaded one."""

TOOLS = ("qemu-system-x86_64", "lvm", "thin_check", "mdadm", "cryptsetup", "mkfs.xfs")

pytestmark = [pytest.mark.vm, pytest.mark.timeout(GUEST_SECONDS + 120)]


def test_in_the_guest() -> None:
    missing = [tool for tool in TOOLS if find_tool(tool) is None]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    tests = ["kernel", "lvm2", "md"]
    options = ["-q", "--tb=short", "-rA", "--durations=5"]
    result = run_in_guest(
        [*(f"tests/guest/test_{name}.py" for name in tests), *options], GUEST_SECONDS
    )
    print(result.log)
    print(f"{result.seconds:.0f} s")
    assert result.passed, result.log[-8000:]
