# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Starts a private server for the tests: an installed program as a child process, or a Docker container."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Protocol

from . import Server, ServerMissing

START_SECONDS = 90
DOCKER_SECONDS = 10
"""The timeout of the question whether the daemon runs."""

# When the tests are killed, the pipe to their children ends; and so does the group of each child.
DIES_WITH_US = 'exec 3<&0; (read _ <&3; kill -KILL 0) & exec "$@" </dev/null 3<&-'


class Instance(Protocol):
    """What `ServerProcess` and `ServerContainer` have in common."""

    def kill(self) -> None: ...

    def restart(self) -> None: ...

    def send(self, signum: signal.Signals) -> None: ...

    def close(self) -> None: ...


class ServerProcess:
    """An installed server as a child process, with all its files in a directory of its own.

    ``answers`` tells whether the server is ready. Raises RuntimeError if it does not become so: it is not missing.
    """

    def __init__(
        self,
        command: list[str],
        directory: Path,
        answers: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._directory = directory
        self._answers = answers
        self._environment = environment
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = spawn(self._command, self._directory, self._environment)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                kill_group(process)
                output = (self._directory / "output").read_text(errors="replace")[-2000:]
                msg = f"{self._command[0]} did not start: {output}"
                raise RuntimeError(msg)
            time.sleep(0.05)
        return process

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        kill_group(self._process)

    def restart(self) -> None:
        self.kill()
        self._process = self._start()

    def send(self, signum: signal.Signals) -> None:
        """To the server alone."""
        self._process.send_signal(signum)

    def close(self) -> None:
        self.kill()


class ServerContainer:
    """A server in Docker: ``port`` of the container is published as ``local_port`` of 127.0.0.1."""

    def __init__(
        self,
        image: str,
        port: int,
        local_port: int,
        answers: Callable[[], bool],
        *options: str,
        command: list[str] | None = None,
    ) -> None:
        self._image = image
        self._answers = answers
        publish = f"127.0.0.1:{local_port}:{port}"
        self._id = docker("run", "-d", "-p", publish, *options, image, *(command or []))
        try:
            self._wait()
        except ServerMissing:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline:
                msg = f"{self._image} in docker did not answer within {START_SECONDS} seconds"
                raise ServerMissing(msg)
            time.sleep(0.2)

    def kill(self) -> None:
        docker("kill", self._id)

    def restart(self) -> None:
        docker("restart", "-t", "0", self._id)
        self._wait()

    def send(self, signum: signal.Signals) -> None:
        docker("kill", f"--signal={signum.name}", self._id)

    def run(self, *command: str) -> None:
        """Run a program in the container."""
        docker("exec", self._id, *command)

    def close(self) -> None:
        docker("rm", "-f", "-v", self._id)


def spawn(
    command: list[str], directory: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in a group of its own, which ends with these tests however they end."""
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


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        msg = f"no server for the tests: docker {arguments[0]}: {done.stderr.strip()[-500:]}"
        raise ServerMissing(msg)
    return done.stdout.strip()


@cache
def has_docker() -> bool:
    """Whether there is a client, and a daemon that answers it."""
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = ["docker", "version"]
        done = subprocess.run(asked, capture_output=True, timeout=DOCKER_SECONDS, check=False)
        return done.returncode == 0
    return False


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


_started_here: set[Path] = set()


@contextmanager
def one_for_all_workers(
    broker: str, directory: Path, start: Callable[[Path], AbstractContextManager[Server]]
) -> Iterator[str]:
    """The URL of one server for all the processes of a test run: the first process starts it for the rest.

    They find it next to the workers' own temporary folders, of which the directory must be a part.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with start(directory) as server:
            yield server.url
        return
    from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock  # not on Windows

    common = directory.parents[1] / f"{broker}-of-all-workers"
    common.mkdir(exist_ok=True)
    url = common / "url"
    if common in _started_here:  # by another fixture: that one must not wait for this one
        yield url.read_text()
        return
    with (common / "using").open("w") as using, (common / "starting").open("w") as starting:
        flock(using, LOCK_SH)
        flock(starting, LOCK_EX)
        if url.exists():
            flock(starting, LOCK_UN)
            yield url.read_text()
            return
        with start(directory) as server:
            _started_here.add(common)
            url.write_text(server.url)
            flock(starting, LOCK_UN)
            try:
                yield server.url
            finally:
                flock(using, LOCK_EX)  # waits until no other process uses it
                url.unlink()
