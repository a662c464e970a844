# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""``run --reload``, in development: a changed file of the service ends it gracefully, and starts it again."""

import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..signals import shutdown_signals

CHECK_MS = 500
"""How often to look whether the service has ended by itself."""


def run_reloading() -> int:
    """Run this command without its option in a child, until a signal; returns the child's exit code."""
    try:
        watch: Any = import_module("watchfiles").watch
    except ImportError:
        msg = "run --reload needs watchfiles, of the dependency group dev: run `uv sync`"
        raise UsageError(msg) from None
    command = [sys.executable, *(arg for arg in sys.orig_argv[1:] if not arg.startswith("--r"))]
    stopping, children = threading.Event(), list[subprocess.Popen[bytes]]()

    def forward(signum: int, _frame: object) -> None:
        stopping.set()
        for child in children[-1:]:
            child.send_signal(signum)

    def start() -> subprocess.Popen[bytes]:
        # The child has its own session: Ctrl-C reaches it once, by `forward`.
        children.append(subprocess.Popen(command, start_new_session=True))
        if stopping.is_set():  # the signal came before the child existed
            children[-1].terminate()
        return children[-1]

    for signum in shutdown_signals():
        signal.signal(signum, forward)
    child, told = start(), False
    options = {"rust_timeout": CHECK_MS, "yield_on_timeout": True, "raise_interrupt": False}
    try:
        dotenv = Path(".env").read_bytes() if Path(".env").exists() else b""
        for changes in watch(Path(__file__).parents[2], stop_event=stopping, **options):
            before = dotenv  # read, not watched, since editors replace the file
            with suppress(OSError):
                dotenv = Path(".env").read_bytes()
            changed = [*(path for _, path in changes), *[".env"] * (dotenv != before)]
            if changed and not stopping.is_set():
                print(f"{min(changed)} has changed", file=sys.stderr)
                child.terminate()
                child.wait()
                if not stopping.is_set():
                    child, told = start(), False
            elif child.poll() is not None and not told:
                told, code = True, child.returncode
                print(f"ended with exit code {code}; waiting for a change", file=sys.stderr)
    except (OSError, RuntimeError) as error:  # such as at the limit of inotify
        child.terminate()
        raise UsageError(f"run --reload cannot watch the files: {error}") from error
    finally:
        code = child.wait()
    return code if code >= 0 else 128 - code
