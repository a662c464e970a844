# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Starts a private server for the tests: an installed program as a child process, or a Docker container."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from . import ServerMissing

START_SECONDS = 90
DOCKER_SECONDS = 10
"""The time limit to find out whether the daemon runs."""

# When the tests are killed, the pipe to their children ends; and so does the group of each child.
DIES_WITH_US = 'exec 3<&0; (read _ <&3; kill -KILL 0) & exec "$@" </dev/null 3<&-'


class ServerProcess:
    """An installed server as a child process, with all its files in its own directory.

    ``answers`` tells whether the server is ready. Raises RuntimeError if it does not get ready: it is not missing.
    """

    def __init__(
        self,
        command: list[str],
        directory: Path,
        answers: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = command
        self._directory = directory
        self._answers = answers
        self.environment = environment
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = spawn(self.command, self._directory, self.environment)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                kill_group(process)
                output = (self._directory / "output").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.command[0]} did not start: {output}")
            time.sleep(0.05)
        return process

    def kill(self) -> None:
        """Send SIGKILL to the whole process group."""
        kill_group(self._process)

    def restart(self) -> None:
        self.kill()
        self._process = self._start()

    def send(self, signum: signal.Signals) -> None:
        """Send the signal to the server alone."""
        self._process.send_signal(signum)

    def close(self) -> None:
        self.kill()


class ServerContainer(ServerProcess):
    """A server in Docker: ``port`` of the container is published as ``local_port`` of 127.0.0.1."""

    def __init__(
        self,
        image: str,
        port: int,
        local_port: int,
        directory: Path,
        answers: Callable[[], bool],
        *options: str,
        command: Sequence[str] = (),
    ) -> None:
        publish = f"127.0.0.1:{local_port}:{port}"
        self.id = docker("create", "-p", publish, *options, image, *command)
        try:
            super().__init__(["docker", "start", "--attach", self.id], directory, answers)
        except BaseException:
            self._remove()
            raise

    def kill(self) -> None:
        with suppress(ServerMissing):  # the daemon does not run
            docker("kill", self.id)
        super().kill()

    def send(self, signum: signal.Signals) -> None:
        docker("kill", f"--signal={signum.name}", self.id)

    def close(self) -> None:
        super().close()
        self._remove()

    def _remove(self) -> None:
        docker("rm", "-f", "-v", self.id)


def spawn(
    command: list[str], directory: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in its own process group, which ends with these tests in any case."""
    with (directory / "output").open("ab") as output:
        return subprocess.Popen(
            ["sh", "-c", DIES_WITH_US, "sh", *command],
            env=environment,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def docker(*arguments: str, seconds: float | None = None) -> str:
    command = ["docker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode != 0:
        msg = f"no server for the tests: docker {arguments[0]}: {done.stderr.strip()[-500:]}"
        raise ServerMissing(msg)
    return done.stdout.strip()


@cache
def has_docker() -> bool:
    """Whether there is a client, and a daemon that answers."""
    with suppress(OSError, subprocess.TimeoutExpired, ServerMissing):
        docker("version", seconds=DOCKER_SECONDS)
        return True
    return False


def free_port() -> int:
    """An ended connection keeps the port in TIME_WAIT: for a minute only a server can have it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()  # the first to close
        return int(listener.getsockname()[1])


def free_ports(count: int) -> list[int]:
    return [free_port() for _ in range(count)]
