"""One server of each broker for all processes of a test run; a service's tests have one for each process."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import servers
from harness.servers import Server

OF_EACH_PROCESS = ("mqtt", "sqlite")
"""These start in an instant, or are a file."""

_started_here: set[Path] = set()


@contextmanager
def one_for_all_workers(
    broker: str, directory: Path, start: Callable[[Path], AbstractContextManager[Server]]
) -> Iterator[str]:
    """The URL of one server for all processes of a test run: the first process starts it for the others.

    The others find it beside the workers' temporary folders, so the directory must be in one of these.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with start(directory) as server:
            yield server.url
        return
    from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock  # not on Windows

    common = directory.parents[1] / f"{broker}-of-all-workers"
    common.mkdir(exist_ok=True)
    url = common / "url"
    if common in _started_here:  # another fixture started it: this one must not wait for that
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


def server_module(broker: str) -> Any:
    """As `harness.servers.server_module`; its shared server is one for all processes."""
    module = servers.server_module(broker)
    if broker in OF_EACH_PROCESS:
        return module

    @contextmanager
    def shared(directory: Path) -> Iterator[Server]:
        with ExitStack() as running:
            url = running.enter_context(one_for_all_workers(broker, directory, module.shared))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CONSUMER_TEST_BROKER_URL", url)
                server = running.enter_context(module.shared(directory))
            yield server

    return SimpleNamespace(shared=shared, private=module.private)
