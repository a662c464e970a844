# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""`dead-letters browse`: a page for one person, on loopback, with the rights of the command.

The path of each request has a token, as the page's address has. The host of each request is checked, as another site's
name may resolve to this machine. The page shows data from any producer: browse.html shows it as text, and the
response's security policy allows no other script. A change is a POST request, whose response has its steps:
when the page is closed, the action ends after its current step.
"""

import asyncio
import hashlib
import json
import math
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..brokers.dead_letters import Selection
from ..brokers.source import Broker
from ..cancellation import CancellationRequested
from ..consumer import Lifespan, unless_set
from ..errors import ServiceError, UsageError
from ..handlers import Router
from ..message import DeadLetter
from ..redaction import redacted
from .letters import changing, closing, shown, try_handlers

PAGE = Path(__file__).with_suffix(".html")
MOST_LETTERS = 10_000
"""The page has the oldest letters; the command `list` shows more."""
MOST_TRIED = 100
MOST_BYTES = 2**20
"""The limit of a request: the keys of MOST_LETTERS letters."""
HEAD_SECONDS = 10.0
METRICS_SECONDS = 2.0

Lines = AsyncGenerator[dict[str, Any], None]


class Chosen(Selection):
    """Letters on the page, selected by keys: their ids are the producers', may repeat, and are shown redacted."""

    def matches(self, letter: DeadLetter) -> bool:
        return _key_of(letter) in (self.ids or ())


@dataclass
class Browser:
    """Answers the requests of the page; one request at a time uses the broker."""

    source: Broker
    router: Router
    lifespan: Lifespan | None

    def __post_init__(self) -> None:
        self.token = secrets.token_urlsafe(24)
        self.hosts: set[str] = set()
        self._using = asyncio.Lock()
        self._answers: Mapping[tuple[str, str], Callable[[Selection], Lines]] = {
            ("GET", "letters"): self._letters,
            ("GET", "service"): self._service,
            ("POST", "show"): self._show,
            ("POST", "try"): self._try,
            ("POST", "replay"): lambda chosen: self._change(chosen, replay=True),
            ("POST", "purge"): lambda chosen: self._change(chosen, replay=False),
        }

    async def start(self, port: int) -> tuple[asyncio.Server, str]:
        """The server, and the address of the page. Raises UsageError."""
        try:
            server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=MOST_BYTES)
        except (OSError, OverflowError) as error:
            raise UsageError(f"--port: cannot listen on 127.0.0.1:{port}: {error}") from error
        port = server.sockets[0].getsockname()[1]
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        return server, f"http://127.0.0.1:{port}/{self.token}/"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, TimeoutError, EOFError, ValueError, asyncio.LimitOverrunError):
                async with asyncio.timeout(HEAD_SECONDS):
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    start, *lines = head.rstrip().split("\r\n")
                    named = [line.partition(":") for line in lines]
                    headers = {name.strip().lower(): value.strip() for name, _, value in named}
                    length = int(headers.get("content-length", 0))
                    if length > MOST_BYTES:
                        _head(writer, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                        writer.write(f"a request has at most {MOST_BYTES} bytes\n".encode())
                        return await writer.drain()
                    body = await reader.readexactly(length)
                method, target, *_ = f"{start}  ".split(" ")
                await self._answer(method, target, headers, body, reader, writer)
                await writer.drain()
        finally:
            writer.close()

    async def _answer(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        _, token, name, *_ = [*target.split("/"), "", "", ""]
        origin = headers.get("origin", "").removeprefix("http://")
        answer = self._answers.get((method, name))
        if headers.get("host") not in self.hosts or (origin and origin not in self.hosts):
            _head(writer, HTTPStatus.MISDIRECTED_REQUEST)
        elif not secrets.compare_digest(token.encode(), self.token.encode()):
            _head(writer, HTTPStatus.FORBIDDEN)
        elif (method, name) == ("GET", ""):
            nonce = secrets.token_urlsafe(16)
            _head(writer, HTTPStatus.OK, "text/html; charset=utf-8", nonce)
            writer.write(PAGE.read_bytes().replace(b"NONCE", nonce.encode()))
        elif answer is None:
            _head(writer, HTTPStatus.NOT_FOUND)
        else:
            _head(writer, HTTPStatus.OK, "application/x-ndjson")
            try:
                chosen = _chosen(**json.loads(body)) if method == "POST" else Chosen()
                answering = _write_steps(answer(chosen), reader, writer)
                await (_unless_closed(answering, reader) if name == "try" else answering)
            except Exception as error:
                kind = "" if isinstance(error, ServiceError) else f"{type(error).__name__}: "
                text = redacted(f"{kind}{error}")
                writer.write(json.dumps({"error": text}).encode() + b"\n")

    async def _letters(self, _chosen: Selection) -> Lines:
        async with self._using:
            total = await self.source.count_dead_letters()
            yield {"source": redacted(self.source.settings.source), "total": total}
            async with closing(self.source.dead_letters(MOST_LETTERS)) as letters:
                async for letter in letters:
                    yield {**shown(letter), "key": _key_of(letter)}

    async def _show(self, chosen: Selection) -> Lines:
        async with self._using, closing(self.source.dead_letters(1, chosen)) as letters:
            async for letter in letters:
                yield shown(letter, body=True, headers=True)

    async def _try(self, chosen: Selection) -> Lines:
        reading = self.source.dead_letters(MOST_TRIED, chosen)
        trying = try_handlers(self.source, self.router, self.lifespan, reading)
        async with self._using, closing(trying) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def _change(self, chosen: Selection, *, replay: bool) -> Lines:
        async with self._using:
            yield {"done": 0}
            async with await changing(self.source, chosen, replay=replay) as steps:
                async for done in steps:
                    yield {"done": done}

    async def _service(self, _chosen: Selection) -> Lines:
        """The lines of the probe port's pages, on this machine or at CONSUMER_PROBE_HOST."""
        settings = self.source.settings
        for path in ("readyz", "metrics") if settings.probe_port else ():
            try:
                async with asyncio.timeout(METRICS_SECONDS):
                    reader, writer = await asyncio.open_connection(
                        settings.probe_host or "127.0.0.1", settings.probe_port
                    )
                    writer.write(f"GET /{path} HTTP/1.1\r\nHost: probe\r\n\r\n".encode())
                    text = (await reader.read(-1)).decode(errors="replace")
                    writer.close()
            except (OSError, TimeoutError):
                return
            for line in redacted(text.partition("\r\n\r\n")[2]).splitlines():
                if path == "readyz" or (line.startswith("consumer_") and "_bucket" not in line):
                    yield {"line": line}


def _key_of(letter: DeadLetter) -> str:
    parts = (letter.id, letter.type, letter.reason, letter.dead_lettered_at)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _chosen(*, keys: list[str], rate: float = math.inf) -> Chosen:
    """The letters that a request names. Raises TypeError or ValueError."""
    if not rate >= 1:
        raise ValueError("rate is below 1")
    return Chosen(frozenset(keys), rate=rate)


async def _write_steps(
    steps: Lines, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Write the steps until the page is closed, or stops the request."""
    async with aclosing(steps):
        async for step in steps:
            writer.write(json.dumps(step).encode() + b"\n")
            await writer.drain()
            if reader.at_eof():
                return


async def _unless_closed(
    answering: Coroutine[Any, Any, None], reader: asyncio.StreamReader
) -> None:
    """Cancel the answer when the page is closed, so that a handler that hangs does not block the next request."""
    closed = asyncio.Event()

    async def watch() -> None:
        with suppress(OSError):
            await reader.read()
        closed.set()

    watching = asyncio.create_task(watch())
    try:
        with suppress(CancellationRequested):
            await unless_set(answering, closed)
    finally:
        watching.cancel()


def _head(
    writer: asyncio.StreamWriter, status: HTTPStatus, content: str = "text/plain", nonce: str = ""
) -> None:
    allowed = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
    writer.write(
        f"HTTP/1.1 {status} {status.phrase}\r\nConnection: close\r\nContent-Type: {content}\r\n"
        f"Content-Security-Policy: default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'\r\nCache-Control: no-store\r\nReferrer-Policy: no-referrer\r\n"
        "X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n\r\n".encode()
    )


async def browse(source: Broker, router: Router, lifespan: Lifespan | None, port: int) -> None:
    """Serve the page until the task is cancelled, as by a signal. Raises UsageError."""
    server, address = await Browser(source, router, lifespan).start(port)
    print(f"{address}\nCtrl+C ends it. Whoever has this address has your rights.", flush=True)
    async with server:
        await asyncio.sleep(math.inf)
