"""The only place that prints errors and ends the process."""

from __future__ import annotations

import json
import os
import signal
import sys

from imager.errors import ImagerError

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its code (see `docs/exit-codes.md`)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, cleaning up
    sys.exit(_run())


def _run() -> int:
    import typer

    from imager.cli.app import app

    try:
        code = app(prog_name="imager", standalone_mode=False)
        sys.stdout.flush()
        return _interrupted() if code == _INTERRUPTED else int(code or 0)
    except ImagerError as error:
        return _report(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except typer.TyperException as error:
        return _report(error.format_message(), "see: imager --help", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _report(str(error), None, 1)
    except Exception as error:
        if os.environ.get("IMAGER_DEBUG"):
            raise
        what = f"internal error: {type(error).__name__}: {error}"
        return _report(what, "please report it; IMAGER_DEBUG=1 shows where it happened", 1)


def _interrupted() -> int:
    hint = "run the same command again: it goes on from what is there"
    return _report("interrupted", hint, _INTERRUPTED)


def _report(message: str, hint: str | None, code: int) -> int:
    if "--json" in sys.argv:
        error = {"message": message, "hint": hint, "exit_code": code}
        print(json.dumps({"error": error}, ensure_ascii=False))
    print(f"imager: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
