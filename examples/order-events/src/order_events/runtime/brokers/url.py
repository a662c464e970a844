# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Reads ``CONSUMER_BROKER_URL``: address, credentials, options and TLS files, with one sentence for each mistake.

No sentence quotes the URL or its parser's error, since each may hold a part of the password.
"""

import math
import ssl
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import BrokerRefused, MendableRefusal
from ..redaction import keep_secret
from ..settings import ConsumerSettings

U = TypeVar("U")

TLS_OPTIONS = ("cafile", "certfile", "keyfile")
"""Options that name PEM files: the CA, and the client's certificate with its key."""


class BrokerUrl:
    """The parts of a URL like ``scheme://user:password@host:port,host:port/path?option=value``.

    ``like`` shows such a URL in the sentence for one that cannot be read; ``options`` are the names that may stand in
    the query, None if the client library knows them. Raises BrokerRefused.
    """

    def __init__(
        self,
        text: str,
        *,
        like: str,
        options: Collection[str] | None = (),
        default_port: int | None = None,
    ) -> None:
        self.like = like
        readable = False
        with suppress(ValueError):
            parts = urlsplit(text, allow_fragments=False)
            credentials, _, hosts = parts.netloc.rpartition("@")
            self.hosts = [_host(host, default_port) for host in hosts.split(",") if host]
            self.options = dict(parse_qsl(parts.query, keep_blank_values=True))
            # A part of a password with an unescaped character is a host or an option here, and would be shown.
            readable = "@" not in parts.path + parts.query
        if not readable:  # raised here, so that the parser's error is not its context
            raise self.unreadable()
        self.scheme = parts.scheme.lower()
        user, colon, password = credentials.partition(":")
        self.user = unquote(user)
        """Empty if there is none."""
        self.password = unquote(password) if colon else None
        self.path = unquote(parts.path.removeprefix("/"))
        self.redacted = f"{self.scheme}://{','.join(self.hosts)}"
        """The address, without credentials: for logs and errors."""
        for option in (one for one in self.options if options is not None and one not in options):
            known = ", ".join(sorted(options or ())) or "none"
            msg = f"CONSUMER_BROKER_URL: unknown option {option[:40]!r}; known options: {known}"
            raise BrokerRefused(msg)

    def __str__(self) -> str:
        return f"{self.redacted}/{self.path}"

    def unreadable(self) -> BrokerRefused:
        """The refusal of a URL that does not look like the documented one."""
        return BrokerRefused(
            f"CONSUMER_BROKER_URL: not like {self.like}; in a user name, a password or an option, "
            "characters like @ : / ? # % are percent-encoded"
        )

    def number(
        self, option: str, default: float, *, at_least: float = 0, at_most: float = math.inf
    ) -> float:
        """The option as a finite number between the two. Raises BrokerRefused."""
        if (text := self.options.get(option)) is None:
            return default
        with suppress(ValueError):
            number = float(text)
            if at_least <= number <= at_most and math.isfinite(number):
                return number
        most = "" if at_most == math.inf else f", at most {at_most:g}"
        msg = f"CONSUMER_BROKER_URL: {option} must be a number of at least {at_least:g}{most}"
        raise BrokerRefused(msg)

    def whole_number(
        self, option: str, default: int, *, at_least: int = 1, at_most: int = 2**31
    ) -> int:
        """The option as a whole number between the two. Raises BrokerRefused."""
        number = self.number(option, default, at_least=at_least, at_most=at_most)
        if number != int(number):
            raise BrokerRefused(f"CONSUMER_BROKER_URL: {option} must be a whole number")
        return int(number)

    def tls_context(self) -> ssl.SSLContext:
        """A client's context that verifies the broker. Raises BrokerRefused.

        Call it for each connection, since certificates may be renewed on disk.
        """
        cafile, certfile, keyfile = map(self.options.get, TLS_OPTIONS)
        try:
            context = ssl.create_default_context(cafile=cafile)
            if certfile is not None:
                context.load_cert_chain(certfile, keyfile, password="")  # or OpenSSL asks for one
        except (OSError, ValueError) as error:
            raise MendableRefusal(
                f"CONSUMER_BROKER_URL: cafile, certfile or keyfile (without a passphrase): {error}"
            ) from error
        return context


class CurrentUrl(Generic[U]):
    """Call it for each attempt to connect: CONSUMER_BROKER_URL_FILE may have a rotated password.

    ``parse`` makes the broker's URL of the text, and raises BrokerRefused; its ``str`` is the address.
    """

    def __init__(self, settings: ConsumerSettings, parse: Callable[[str], U]) -> None:
        self._file, self._parse = settings.broker_url_file, parse
        self._text = settings.broker_url.get_secret_value()
        self._url = parse(self._text)

    def __call__(self) -> U:
        with suppress(OSError, UnicodeError, BrokerRefused):  # the last URL may still be right
            if (text := Path(self._file).read_text("utf-8").strip()) != self._text:
                keep_secret({"secret": text})
                if str(url := self._parse(text)) == str(self._url):  # no other broker gets it
                    self._text, self._url = text, url
        return self._url


def _host(text: str, default_port: int | None) -> str:
    """``host:port``, with the default port if there is none. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port == 0 or parts.path:
        raise ValueError
    if parts.port is None and default_port is not None:
        return f"{text.rstrip(':')}:{default_port}"
    return text
