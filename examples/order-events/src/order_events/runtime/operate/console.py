# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Standard input, progress and closed streams, for the commands of a person or a script."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Self

from ..errors import UsageError

AT_ONCE = 100
"""Messages to publish and count in one step: an interrupted command says how many were confirmed."""


async def read_messages(argument: str) -> AsyncIterator[list[bytes]]:
    """The message of the command line, or the lines of standard input as they arrive. Raises UsageError."""
    if argument != "-":
        yield [checked_json(argument.encode(errors="surrogateescape"), "the message")]
        return
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes | Exception] = asyncio.Queue()
    room = threading.Semaphore(2)

    def read() -> None:
        # A daemon thread: a read that never ends blocks neither the connection's heartbeat nor the exit.
        # And not by sys.stdin, whose lock, held by a thread at exit, would abort the interpreter.
        chunk: bytes | Exception = b"-"
        with suppress(RuntimeError):  # the loop is closed
            while chunk:
                room.acquire()
                try:
                    chunk = os.read(sys.stdin.fileno(), 65_536)
                except (OSError, ValueError) as error:
                    chunk = error
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    line_number = 0
    rest: list[bytes] = []
    while chunk := await chunks.get():
        if isinstance(chunk, Exception):
            raise UsageError(f"standard input cannot be read: {chunk}")
        room.release()
        if b"\n" not in chunk:  # part of a long line, which is joined once, not for each chunk
            rest.append(chunk)
            continue
        *lines, end = b"".join([*rest, chunk]).split(b"\n")
        rest = [end]
        bodies: list[bytes] = []
        for line in lines:
            line_number += 1
            try:
                if line.strip():
                    bodies.append(checked_json(line, f"line {line_number}"))
            except UsageError:
                if bodies:
                    yield bodies  # the lines before an invalid one are published anyway
                raise
        for start in range(0, len(bodies), AT_ONCE):
            yield bodies[start : start + AT_ONCE]
    if last := b"".join(rest).strip():
        yield [checked_json(last, f"line {line_number + 1}")]


def checked_json(text: bytes, where: str) -> bytes:
    try:
        json.loads(text.decode())  # json accepts bytes in encodings that no handler accepts
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    return text.strip()


class Progress:
    """A counter on standard error: live on a terminal, and one line at the end, also of work that was interrupted."""

    def __init__(self, verb: str, where: str) -> None:
        self.count = 0
        self._verb, self._where = verb, where
        self._started = self._shown = time.monotonic()

    def advance(self, number: int) -> None:
        self.count += number
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown > 0.1:
            self._shown = now
            rate = self.count / (now - self._started)
            text = f"\r{self._verb} {self.count:,} ({rate:,.0f}/s)"
            print(text, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        start = "\r\033[K" if sys.stderr.isatty() else ""
        plural = "" if self.count == 1 else "s"
        print(f"{start}{self._verb} {self.count:,} message{plural} {self._where}", file=sys.stderr)


def replace_closed_streams() -> None:
    """A parent may have closed the standard streams: Python then has None there, and the next file or connection
    gets the stream's file descriptor and its output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            devnull = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(devnull, mode, closefd=False))


def flush_output() -> None:
    """Flush, so that the interpreter's own flush at exit cannot fail on a closed pipe and change the code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
