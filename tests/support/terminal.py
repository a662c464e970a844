"""A command as in a terminal, that is ended by Ctrl-C when its log has an event."""

import os
import signal
import subprocess
from pathlib import Path


def run_until(event: str, command: str, folder: Path) -> str:
    """Returns what it printed; its exit code must be 0."""
    with subprocess.Popen(
        ["env", *command.split()],  # which may begin with variables
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        seen = []
        try:
            for line in process.stdout:
                seen.append(line)
                if f'"{event}"' in line:
                    os.killpg(process.pid, signal.SIGINT)
        finally:
            if process.poll() is None:
                process.kill()
    output = "".join(seen)
    assert process.wait() == 0, output
    return output
