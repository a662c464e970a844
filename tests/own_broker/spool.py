# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""A spool: one file for each message, in folders that the processes of one machine share.

``spool:////var/spool/orders``, with ``?lease_seconds=30``. A message is in ``ready``, in ``held/<consumer>``, or in
``dead``; renaming its file from one to the next makes sure that one consumer has it. A consumer that sees
that another one has not touched its folder for longer than the lease requeues its messages.
"""

import asyncio
import itertools
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .source import BrokerRefused, BrokerUnavailable, Capabilities, Connectivity, Source

LEASE_SECONDS = 30.0
POLL_SECONDS = 0.05

_last_words = itertools.count()


class SpoolSource(Source):
    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed_retry=True, attempts=True, requeue=True, dead_letters=True, order=True
    )

    def __init__(self, settings: ConsumerSettings, prefetch: int = 1) -> None:
        super().__init__(settings, prefetch)
        url = urlsplit(settings.broker_url.get_secret_value())
        root = Path(unquote(url.path)[1:]).absolute() / settings.source
        self._ready, self._all_held, self._dead = root / "ready", root / "held", root / "dead"
        self._held = self._all_held / uuid.uuid4().hex
        self._lease_seconds = float(parse_qs(url.query).get("lease_seconds", [LEASE_SECONDS])[0])
        self.connectivity = Connectivity(str(root))
        self._unacked: set[Message] = set()
        self._closing = asyncio.Event()
        self._fetcher: asyncio.Task[None] | None = None
        self._taking = False

    async def __aenter__(self) -> Self:
        try:
            for folder in (self._ready, self._all_held, self._dead):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"{self.connectivity.broker} cannot be used: {error.strerror}"
            raise BrokerRefused(msg) from error
        self.connectivity.established()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._taking, self.connectivity.up = False, False
        self._closing.set()
        if self._fetcher is not None:
            await asyncio.wait({self._fetcher}, timeout=1)
        for message in self.buffer.take_all():
            await self.requeue(message)
        self._unacked.clear()
        if self._held.exists():
            self._put_back(self._held)

    @property
    def connected(self) -> bool:
        return self.connectivity.up

    async def start(self) -> None:
        self._held.mkdir()
        self._taking = True
        self._fetcher = asyncio.create_task(self._fill_for_ever(), name="spool-fetcher")

    async def stop(self) -> None:
        self._taking = False
        for message in self.buffer.take_all():
            await self.requeue(message)
        self.buffer.close()

    async def _fill_for_ever(self) -> None:
        try:
            await self.connectivity.keep(self._fill, until=self._closing)
        except Exception as failure:
            self.buffer.fail(failure)

    async def _fill(self) -> None:
        try:
            os.utime(self._held)  # also while draining: the in-flight messages keep their lease
            for other in self._all_held.iterdir():
                with suppress(FileNotFoundError):
                    if time.time() - other.stat().st_mtime > self._lease_seconds:
                        self._put_back(other)
            for file in _files(self._ready) if self._taking else ():
                if len(self._unacked) >= self.prefetch or file.name > _name(time.time()):
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
        about, body = _read(file)
        message = Message(
            body, about["id"], about["type"], about["headers"], about["failures"] + 1, file
        )
        self._unacked.add(message)
        self.buffer.put(message)

    def _put_back(self, held: Path) -> None:
        for file in held.iterdir():
            with suppress(FileNotFoundError):
                file.rename(self._ready / file.name)
        with suppress(OSError):
            held.rmdir()

    # -- settling: a message whose file is gone was redelivered

    def _settle(self, message: Message) -> bool:
        known = message in self._unacked and message.receipt.exists()
        self._unacked.discard(message)
        return known

    async def ack(self, message: Message) -> None:
        if self._settle(message):
            message.receipt.unlink()

    async def requeue(self, message: Message) -> None:
        if self._settle(message):
            message.receipt.rename(self._ready / message.receipt.name)
            self.requeued_count += 1

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        if self._settle(message):
            due = time.time() + delay_seconds
            self._write(self._ready, message.body, due, **_about(message))
            message.receipt.unlink()

    async def reject(self, message: Message, reason: str) -> None:
        if self._settle(message):
            about = {**_about(message), "reason": reason, "dead_lettered_at": time.time()}
            self._write(self._dead, message.body, time.time(), **about)
            message.receipt.unlink()

    # -- publishing and dead letters

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        for message in messages:
            self._write(self._ready, message.body, time.time(), **_about(message))

    def _write(self, folder: Path, body: bytes, due: float, **about: Any) -> None:
        file = folder / _name(due)
        part = self._all_held.parent / f"{file.name}.part"
        with part.open("wb") as stream:
            stream.write(json.dumps(about).encode() + b"\n" + body)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)

    async def describe(self) -> dict[str, int | str]:
        return {
            self.settings.source: len(_files(self._ready)),
            f"{self.settings.source} dead letters": len(_files(self._dead)),
            f"{self.settings.source} consumers": len(_files(self._all_held)),
        }

    async def dead_letters(self, limit: int) -> AsyncIterator[DeadLetter]:
        for file in _files(self._dead)[:limit]:
            about, body = _read(file)
            yield DeadLetter(
                body,
                about["id"],
                about["type"],
                about["reason"],
                about["failures"],
                about["dead_lettered_at"],
            )

    async def count_dead_letters(self) -> int:
        return len(_files(self._dead))

    async def replay_dead_letters(self) -> AsyncIterator[int]:
        for moved, file in enumerate(_files(self._dead), start=1):
            about, body = _read(file)
            fresh = OutgoingMessage(body, about["type"], about["id"], about["headers"])
            await self.publish([fresh])
            file.unlink()
            yield moved

    async def purge_dead_letters(self) -> AsyncIterator[int]:
        for deleted, file in enumerate(_files(self._dead), start=1):
            file.unlink()
            yield deleted


def make_source(settings: ConsumerSettings, prefetch: int = 1) -> SpoolSource:
    return SpoolSource(settings, prefetch)


def _name(due: float) -> str:
    """Names sort by the time that they are due, and then by the order of writing."""
    return f"{due:017.6f}-{next(_last_words):012d}-{uuid.uuid4().hex}"


def _files(folder: Path) -> list[Path]:
    """In the order of their names."""
    return sorted(folder.iterdir())


def _about(message: Message | OutgoingMessage) -> dict[str, Any]:
    failures = message.attempt if isinstance(message, Message) else 0
    return {
        "id": message.id,
        "type": message.type,
        "headers": dict(message.headers),
        "failures": failures,
    }


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    about, _, body = file.read_bytes().partition(b"\n")
    return json.loads(about), body
