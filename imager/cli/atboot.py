"""imager rollback --at-boot, --status, --cancel: the part that knows bootmedia."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from imager.cli.output import print_json

if TYPE_CHECKING:
    from bootmedia.oneshot import Arranged, Status
    from imager.manifest import Disk, Manifest
    from imager.repository import Repository


def arrange(
    repository: Repository,
    pairs: list[tuple[Manifest, Disk, str]],
    *,
    network: str,
    yes: bool,
    json: bool,
    progress: str,
) -> int:
    """Have the next start roll these disks back. Raises RefusedError with every reason against it,
    before anything of /boot is changed."""
    from bootmedia.oneshot import Rollback
    from bootmedia.oneshot import arrange as run
    from imager.cli.asking import confirm_by_name
    from imager.cli.bars import open_progress
    from imager.cli.media import parse_network, pinned
    from imager.errors import RefusedError
    from imager.fingerprint import read_fingerprint

    manifest = pairs[0][0]
    if manifest.partial:
        raise RefusedError([f"{manifest.id} has holes: what could not be read would be lost"])
    plan = Rollback(
        image=pinned(manifest),
        disks=tuple((disk.name, path) for _, disk, path in pairs),
        repository=repository.store.url,
        created=int(time.time()),
        network=parse_network(network),
    )
    if not json:
        print(f"at the next start, {manifest.id} of {manifest.created} goes back to:")
        for _, disk, path in pairs:
            print(f"  {path} ({disk.name}): everything since then is lost")
    if not yes:
        for *_, path in pairs:
            confirm_by_name(path)
    with open_progress(progress) as shown:
        arranged = run(plan, read_fingerprint(), shown)
    if json:
        print_json(arranged.to_json())
    else:
        print("the next start does it, and only that one; restart when it suits you")
        print("imager rollback --cancel takes it back, --status shows it")
    return 0


def cancel(*, json: bool) -> int:
    from bootmedia.oneshot import cancel as run

    found = run()
    if json:
        print_json({"cancelled": found})
    else:
        print("the next start is the usual one" if found else "nothing was arranged")
    return 0


def show_status(*, json: bool) -> int:
    from bootmedia.oneshot import status

    found = status()
    if json:
        print_json(
            None if found is None else {"waiting": found.waiting, **found.arranged.to_json()}
        )
    elif found is None:
        print("no rollback is arranged")
    else:
        _print_status(found, found.arranged)
    return 0


def _print_status(status: Status, arranged: Arranged) -> None:
    what = ", ".join(f"{rule.disk} to the disk with {rule.target}" for rule in arranged.targets)
    print(f"{arranged.image} from {arranged.repository}: {what}")
    if status.waiting:
        print("the next start does it (imager rollback --cancel takes it back)")
    else:
        print("it was started, and nothing was written (imager rollback --cancel removes it)")
