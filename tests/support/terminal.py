"""Commands like in a terminal, which Ctrl-C ends."""

import os
import signal
import subprocess
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Self

WAIT_SECONDS = 120


class Terminal:
    """One command, which may begin with variables."""

    def __init__(self, command: str, folder: Path, **variables: str) -> None:
        self.lines: list[str] = []
        self._changed, self._ended = Condition(), False
        self._process = subprocess.Popen(
            ["env", *command.split()],
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until this many lines have the text."""

        def seen() -> bool:
            return sum(text in line for line in self.lines) >= count

        with self._changed:
            self._changed.wait_for(lambda: seen() or self._ended, WAIT_SECONDS)
            assert seen(), self.output

    def press_ctrl_c(self) -> str:
        """Returns the command's output; its exit code must be 0."""
        os.killpg(self._process.pid, signal.SIGINT)
        code = self._process.wait(WAIT_SECONDS)
        self._reader.join()
        assert code == 0, self.output
        return self.output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout
        self._process.stdout.close()


def run_until(event: str, command: str, folder: Path) -> str:
    """Press Ctrl-C when the log has the event; returns the output. The exit code must be 0."""
    with Terminal(command, folder) as terminal:
        terminal.wait_for(f'"{event}"')
        return terminal.press_ctrl_c()
