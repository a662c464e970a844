# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""A spool: one file for each message, in folders that the processes of one machine share.

``spool:////var/spool/orders``, with ``?lease_seconds=30``. A message is in ``ready``, in ``held/<consumer>``, or in
``dead``; renaming its file from one folder to the next ensures that only one consumer has it. A consumer that has not
touched its folder for longer than the lease counts as dead: the others move its messages back.
"""

import asyncio
import itertools
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import BrokerRefused, BrokerUnavailable
from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .connectivity import Connectivity
from .delivery import headers_of, json_object, make_dead_letter, make_message
from .source import MISSING, Broker, Capabilities
from .url import BrokerUrl

LEASE_SECONDS = 30.0
POLL_SECONDS = 0.05

_last_words = itertools.count()


class SpoolBroker(Broker):
    capabilities: ClassVar[Capabilities] = Capabilities(delayed_publish=True)
    destinations: ClassVar = {"queue": "queue:NAME"}

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        text = settings.broker_url.get_secret_value()
        url = BrokerUrl(text, like="spool:////var/spool", options=["lease_seconds"])
        self._root = Path(url.path).absolute()
        root = self._root / settings.source
        self._ready, self._all_held, self._dead = root / "ready", root / "held", root / "dead"
        self._held = self._all_held / uuid.uuid4().hex
        self._lease_seconds = url.number("lease_seconds", LEASE_SECONDS, at_least=0.01)
        self.connectivity = Connectivity(str(root))
        self._closing = asyncio.Event()
        self._fetcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.connectivity.established()  # a folder needs no connection
        return self

    async def declare(self) -> None:
        try:
            for folder in (self._ready, self._all_held, self._dead):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"{self.connectivity.address} cannot be used: {error.strerror}"
            raise BrokerRefused(msg) from error

    async def __aexit__(self, *exc_info: object) -> None:
        self.connectivity.up = False
        self._closing.set()
        if self._fetcher is not None:
            await asyncio.wait({self._fetcher}, timeout=1)
        self.unacked.clear()
        if self._held.exists():
            self._reclaim(self._held)

    @property
    def connected(self) -> bool:
        return self.connectivity.up

    async def start(self) -> None:
        self._held.mkdir()
        self._fetcher = asyncio.create_task(self._fetch_for_ever(), name="spool-fetcher")

    async def _stop_fetching(self) -> None: ...  # `stopped` is enough

    async def _fetch_for_ever(self) -> None:
        try:
            await self.connectivity.keep(self._fetch, until=self._closing)
        except Exception as failure:
            self.buffer.fail(failure)

    async def _fetch(self) -> None:
        try:
            os.utime(self._held)  # also while draining: in-flight messages stay with this consumer
            for other in self._all_held.iterdir():
                with suppress(FileNotFoundError):
                    if time.time() - other.stat().st_mtime > self._lease_seconds:
                        self._reclaim(other)
            for file in () if self.stopped else _files(self._ready):
                if len(self.unacked) >= self.prefetch or file.name > _name(time.time()):
                    break
                with suppress(FileNotFoundError):  # another consumer was quicker
                    self._take(file)
        except OSError as error:
            raise BrokerUnavailable(str(error)) from error
        self.connectivity.established()
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._closing.wait()

    def _take(self, ready: Path) -> None:
        file = ready.rename(self._held / ready.name)
        self._deliver(_message(file))

    def _reclaim(self, held: Path) -> None:
        for file in held.iterdir():
            with suppress(FileNotFoundError):
                file.rename(self._ready / file.name)
        with suppress(OSError):
            held.rmdir()

    # -- settling

    def _lost_because(self, message: Message) -> str:
        return "" if message.receipt.exists() else "its lease had expired"

    async def _ack(self, message: Message) -> None:
        message.receipt.unlink()

    async def _requeue(self, message: Message) -> None:
        message.receipt.rename(self._ready / message.receipt.name)

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        due = time.time() + delay_seconds
        self._write(self._ready, message.body, due, **_about(message))
        message.receipt.unlink()

    async def _reject(self, message: Message, reason: str) -> None:
        about = {**_about(message), "reason": reason, "dead_lettered_at": time.time()}
        self._write(self._dead, message.body, time.time(), **about)
        message.receipt.unlink()

    # -- publishing and dead letters

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        for message in messages:
            _, name = self.destination_of(message)
            ready = self._root / name / "ready"
            if ready.parent.parent != self._root or not ready.is_dir():
                msg = f"the queue {name!r} {MISSING}"
                raise BrokerRefused(msg)
            due = time.time() + message.delay_seconds
            self._write(ready, message.body, due, **_about(message))

    def _write(self, folder: Path, body: bytes, due: float, **about: Any) -> None:
        file = folder / _name(due)
        part = folder.parent / f"{file.name}.part"
        with part.open("wb") as stream:
            stream.write(json.dumps(about).encode() + b"\n" + body)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)

    async def describe(self) -> dict[str, int | str]:
        if not self._ready.exists():
            return {self.settings.source: MISSING}
        return {
            self.settings.source: len(_files(self._ready)),
            f"{self.settings.source} dead letters": len(_files(self._dead)),
            f"{self.settings.source} consumers": len(_files(self._all_held)),
        }

    async def _present_letters(self, reading: Any) -> AsyncGenerator[DeadLetter, None]:
        for file in _files(self._dead):
            _, about = _read(file)
            yield make_dead_letter(
                _message(file),
                file,
                reason=about.get("reason"),
                attempts=about.get("failures"),
                dead_lettered_at=about.get("dead_lettered_at"),
            )

    async def count_dead_letters(self) -> int:
        return len(_files(self._dead))

    async def _take_letters(
        self, reading: Any, letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        for moved, old in enumerate(letters, start=1):
            if replay:
                await self.publish([OutgoingMessage(old.body, old.type, old.id, old.headers)])
            old.receipt.unlink()
            yield moved


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> SpoolBroker:
    return SpoolBroker(settings, prefetch)


def _name(due: float) -> str:
    """A name that sorts by the due time, and then by the order of writing."""
    return f"{due:017.6f}-{next(_last_words):012d}-{uuid.uuid4().hex}"


def _files(folder: Path) -> list[Path]:
    """The files in the order of their names; none in a folder that is not declared."""
    return sorted(folder.iterdir()) if folder.exists() else []


def _about(message: Message | OutgoingMessage) -> dict[str, Any]:
    failures = message.attempt if isinstance(message, Message) else 0
    return {
        "id": message.id,
        "type": message.type,
        "headers": headers_of(message) if isinstance(message, OutgoingMessage) else message.headers,
        "failures": failures,
    }


def _message(file: Path) -> Message:
    body, about = _read(file)
    return make_message(
        body,
        id=about.get("id"),
        type=about.get("type"),
        headers=about.get("headers"),
        failures=about.get("failures"),
        receipt=file,
    )


def _read(file: Path) -> tuple[bytes, dict[str, Any]]:
    """The body, and the fields of the first line, which any program may have written."""
    about, _, body = file.read_bytes().partition(b"\n")
    return body, json_object(about)
