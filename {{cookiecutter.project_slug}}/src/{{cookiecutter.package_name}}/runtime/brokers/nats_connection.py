# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""One connection to a NATS server: what the URL says, how it is opened, asked, lost and closed; for nats.py."""

import asyncio
import json
import logging
import math
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from nats.aio.client import Client, RawCredentials
from nats.errors import Error, NoRespondersError, SecureConnWantedError

from .source import BrokerError, BrokerRefused, BrokerUnavailable

T = TypeVar("T")

CONNECT_SECONDS = 5.0
"""For each of the hosts."""
ANSWER_SECONDS = 5.0
"""How long the broker may take to answer; then the connection counts as lost."""

TLS_FILES = {"cafile", "certfile", "keyfile"}
OPTIONS = {
    "ack_wait_seconds",
    "replicas",
    "subject",
    "domain",
    "inbox",
    "creds",
    "nkey",
} | TLS_FILES
NOT_AUTHORIZED = re.compile("(authorization|authentication) (violation|expired|revoked)", re.I)
NOT_PERMITTED = re.compile("permissions violation", re.I)

if logging.getLogger("nats").level == logging.NOTSET:
    # It logs tracebacks of what is logged here, once, in a sentence.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


class Refused(BrokerRefused):
    """JetStream's answer was an error of this code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class NotAuthorized(BrokerRefused):
    """The user, the password, the token or the key."""


@dataclass(slots=True)
class Outgoing:
    subject: str
    body: bytes
    headers: dict[str, str]

    @property
    def size(self) -> int:
        lines = (len(name) + len(value.encode()) + 4 for name, value in self.headers.items())
        return len(self.body) + sum(lines) + len(b"NATS/1.0\r\n\r\n")


class Connection(Client):
    """One connection to one server. It is not mended but replaced: nats-py gives up for good when its
    credentials are refused in a reconnect, and would bring back subscriptions whose pulls are in doubt."""

    def __init__(self, url: "Url", on_lost: Callable[[], None]) -> None:
        super().__init__()
        self.lost: Exception | None = None
        self._url = url
        self._on_lost = on_lost

    async def open(self, host: str, name: str) -> None:
        """Raises BrokerUnavailable or BrokerRefused."""
        async with self.asking(CONNECT_SECONDS):
            await self.connect(
                servers=[f"nats://{host}"],
                name=name,
                connect_timeout=math.ceil(CONNECT_SECONDS),
                allow_reconnect=False,
                pending_size=0,  # never wait for the socket in the middle of a publish
                skip_subject_validation=True,  # they are all ours
                error_cb=_ignore,
                **self._url.connect_options(),
            )

    async def close_within(self, seconds: float) -> None:
        """Politely, else by force. Leaves no task behind."""
        tasks = [self._reading_task, self._flusher_task, self._ping_interval_task]
        tasks += [subscription._wait_for_msgs_task for subscription in self._subs.values()]
        await within(seconds, self.close())
        self.cut()
        if running := {task for task in tasks if task is not None}:
            await asyncio.wait(running, timeout=0.5)

    def lose(self, reason: Exception) -> None:
        """The connection is of no use any more. Whoever waits for an answer learns it at once."""
        if self.lost is not None:
            return
        self.lost = reason
        self.cut()
        for future in (*self._resp_map.values(), *self._pongs):
            if not future.done():
                future.set_exception(Error("the connection was lost"))
                future.exception()  # not everyone waits
        self._on_lost()

    def cut(self) -> None:
        self._pending.clear()
        self._pending_data_size = 0
        if (writer := getattr(self._transport, "_io_writer", None)) is not None:
            writer.transport.abort()

    # -- asking

    @asynccontextmanager
    async def asking(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Bounds a request to the broker, and makes whatever goes wrong a BrokerError."""
        seconds = ANSWER_SECONDS if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                if self.lost is not None:
                    raise self.lost
                yield
        except (OSError, Error) as error:
            raise self._explain(error, seconds) from error

    def _explain(self, error: Exception, seconds: float) -> BrokerError:
        broker = self._url.for_people
        text = str(self.lost or error).removeprefix("nats: ").strip("'")
        if NOT_PERMITTED.search(text):
            return BrokerRefused(f"{broker}: {text}")
        if NOT_AUTHORIZED.search(text):
            return NotAuthorized(f"{broker} refused the user, the password, the token or the key")
        if isinstance(error, SecureConnWantedError):
            return BrokerRefused(f"{broker} offers no TLS")
        if isinstance(error, ssl.SSLError):
            return BrokerRefused(f"{broker}: no TLS connection: {error}")
        if isinstance(error, NoRespondersError):
            self.lose(error)  # whatever is missing, the next connection looks for it
            why = "it is off, or has no leader, or the stream is gone"
            return BrokerUnavailable(f"{broker}: JetStream does not answer: {why}")
        if isinstance(error, TimeoutError) and self.lost is None:
            return BrokerUnavailable(f"{broker} gave no answer within {seconds:g} seconds")
        return BrokerUnavailable(f"{broker}: {text or type(error).__name__}")

    async def ask(
        self, subject: str, payload: bytes, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """JetStream's answer. Raises BrokerUnavailable or Refused."""
        async with self.asking():
            message = await self.request(subject, payload, ANSWER_SECONDS, headers=headers)
        answer: dict[str, Any] = json.loads(message.data)
        if error := answer.get("error"):
            msg = f"{self._url.for_people}: {error.get('description', error)}"
            if error.get("code", 500) >= 500:
                raise BrokerUnavailable(msg)
            raise Refused(msg, error.get("err_code", 0))
        return answer

    async def api(self, call: str, **request: Any) -> dict[str, Any]:
        payload = json.dumps(request).encode() if request else b""
        return await self.ask(f"{self._url.api}.{call}", payload)

    async def api_unless(self, code: int, call: str, **request: Any) -> dict[str, Any] | None:
        """As `api`; None if the answer is this error."""
        try:
            return await self.api(call, **request)
        except Refused as refusal:
            if refusal.code != code:
                raise
            return None

    async def ping(self) -> None:
        """Returns when the broker has read everything that was sent before."""
        async with self.asking():
            # Not to be cut short by it: the PONG for one that gave up would end nats-py's reading.
            await self.flush(math.ceil(2 * ANSWER_SECONDS))

    async def store(self, message: Outgoing) -> None:
        """Returns when the broker has stored it."""
        if message.size > self.max_payload:  # for that the server closes the connection
            msg = f"this message is larger than the server's max_payload, {self.max_payload} bytes"
            raise BrokerRefused(msg)
        await self.ask(message.subject, message.body, message.headers or None)

    # -- parts of nats-py, replaced: on an error it would close in the very tasks that this ends

    async def _select_next_server(self) -> None:
        await self._connect_to_server(self._server_pool[0])  # once: we do the rest
        self._current_server = self._server_pool[0]

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._url.insists_on_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise SecureConnWantedError  # it would go on, and send the password
            info["tls_required"] = True

    async def _process_op_err(self, e: Exception) -> None:
        self.lose(e)

    async def _process_err(self, err_msg: str) -> None:
        self.lose(Error(err_msg))


class Url:
    """What CONSUMER_BROKER_URL says."""

    def __init__(self, text: str) -> None:
        """Raises BrokerRefused, without the URL: it may hold a password."""
        try:
            parts = urlsplit(text)
            credentials, at, hosts = parts.netloc.rpartition("@")
            each = [urlsplit(f"//{host}") for host in hosts.split(",")]
            good = all(host.hostname and host.port != 0 for host in each)
            rest = f"{parts.path.strip('/')}{parts.fragment}{'' if at else parts.query}"
        except ValueError:
            good, rest = False, ""
        if not good or parts.fragment or parts.path.strip("/") or "@" in rest:
            msg = (
                "CONSUMER_BROKER_URL: not like nats://user:password@host:4222,host:4222?option=value; in a user name, "
                "a password or an option, characters like @ : / ? # % are percent-encoded"
            )
            raise BrokerRefused(msg)
        user, colon, password = credentials.partition(":")
        self.hosts = hosts.split(",")
        self.for_people = f"{parts.scheme}://{hosts}"
        self._user, self._password = unquote(user), unquote(password) if colon else None
        self._options = dict(parse_qsl(parts.query, keep_blank_values=True))
        for option in self._options.keys() - OPTIONS:
            msg = f"CONSUMER_BROKER_URL: NATS has no option {option!r}, but {', '.join(sorted(OPTIONS))}"
            raise BrokerRefused(msg)
        self.insists_on_tls = parts.scheme == "tls" or bool(self._options.keys() & TLS_FILES)
        self.subject = self._options.get("subject")
        self.api = f"$JS.{domain}.API" if (domain := self._options.get("domain")) else "$JS.API"
        self.ack_wait_seconds = self._number("ack_wait_seconds")
        self.replicas = round(self._number("replicas") or 1)

    def _number(self, option: str) -> float | None:
        if (text := self._options.get(option)) is None:
            return None
        with suppress(ValueError):
            if 0 < (number := float(text)) < math.inf:
                return number
        msg = f"CONSUMER_BROKER_URL: {option} must be a number above 0"
        raise BrokerRefused(msg)

    def connect_options(self) -> dict[str, Any]:
        """Of nats-py. Files are read for each connection, as others may renew them."""
        options: dict[str, Any] = {"inbox_prefix": self._options.get("inbox", "_INBOX")}
        if self._password is not None:
            options |= {"user": self._user, "password": self._password}
        elif self._user:
            options["token"] = self._user
        which = "cafile, certfile or keyfile"
        try:
            if self.insists_on_tls:
                options["tls"] = ssl.create_default_context(cafile=self._options.get("cafile"))
                if certificate := self._options.get("certfile"):
                    options["tls"].load_cert_chain(certificate, self._options.get("keyfile"))
            if path := self._options.get(which := "creds"):
                options["user_credentials"] = RawCredentials(_checked_creds(Path(path).read_text()))
            if path := self._options.get(which := "nkey"):
                options["nkeys_seed_str"] = _checked_seed(Path(path).read_text())
        except (OSError, ValueError) as error:
            msg = f"CONSUMER_BROKER_URL: {which}: {error}"
            raise BrokerRefused(msg) from error
        return options


def _checked_creds(text: str) -> str:
    """Raises ValueError; nats-py would look for ever for what is missing."""
    seed = re.search(r"BEGIN USER NKEY SEED-+\s+(\S+)", text)
    if seed is None or not re.search(r"BEGIN NATS USER JWT-+\r?\n\S", text):
        msg = "the file does not hold a JWT and a seed"
        raise ValueError(msg)
    _checked_seed(seed[1])
    return text


def _checked_seed(text: str) -> str:
    import nkeys  # type: ignore[import-untyped, unused-ignore]  # slow, and seldom needed

    try:
        nkeys.from_seed(bytearray(text.strip().encode())).wipe()
    except Exception:
        msg = "the file does not hold the seed of an nkey"
        raise ValueError(msg) from None  # not with its words: they may hold a part of the seed
    return text


async def gather_all(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all of them, or the first error when all have ended."""
    results = []
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


async def within(seconds: float, work: Coroutine[Any, Any, None]) -> bool:
    """Let it work for so long; returns whether it came to its end, a good one or not. Leaves no task behind."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.done()
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
        if task.done() and not task.cancelled():
            task.exception()  # of no interest any more


async def _ignore(_error: Exception) -> None:
    """What matters of nats-py's errors arrives by other ways."""
