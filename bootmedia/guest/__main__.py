"""``python3 -m bootmedia.guest``: started by the rescue system's /init."""

from __future__ import annotations

import sys

from bootmedia.guest.main import main
from imager.errors import ImagerError

if __name__ == "__main__":
    try:
        main()
    except ImagerError as error:
        sys.exit(f"{error.message}\n{error.hint or ''}")
