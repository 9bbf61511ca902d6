"""Maps of what this machine's kernel may lack: volume groups, mirrors, encrypted containers, and
filesystems, under a kernel that has them."""

from __future__ import annotations

import pytest

from imager.process import find_tool
from tests.machines.guest import run_in_guest

GUEST_SECONDS = 600
"""About 90 to 150 s on an idle machine of two cores, several times that on a loaded one."""

TOOLS = {
    ("kernel", "lvm2", "md"): ("lvm", "thin_check", "mdadm", "cryptsetup", "mkfs.xfs"),
    ("allocation_drivers", "allocation_xfs_v4"): (
        "mkfs.vfat",
        "mkfs.exfat",
        "mkfs.f2fs",
        "mkfs.xfs",
    ),
}

pytestmark = [pytest.mark.vm, pytest.mark.timeout(GUEST_SECONDS + 120)]


@pytest.mark.parametrize("names", TOOLS, ids=["containers", "drivers"])
def test_in_the_guest(names: tuple[str, ...]) -> None:
    needed = ("qemu-system-x86_64", *TOOLS[names])
    missing = [tool for tool in needed if find_tool(tool) is None]
    if missing:
        pytest.skip(f"not installed: {' '.join(missing)}")
    options = ["-q", "--tb=short", "-rA", "--durations=5"]
    files = [f"tests/guest/test_{name}.py" for name in names]
    result = run_in_guest([*files, *options], GUEST_SECONDS)
    print(result.log)
    print(f"{result.seconds:.0f} s")
    assert result.passed, result.log[-8000:]
