# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Reads ``CONSUMER_BROKER_URL``: address, credentials, options and TLS files, with one sentence for each mistake.

No sentence quotes the URL or its parser's error, since each may hold a part of the password.
"""

import math
import ssl
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import BrokerRefused

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
        for option in () if options is None else self.options.keys() - set(options):
            known = ", ".join(sorted(options or ())) or "none"
            msg = f"CONSUMER_BROKER_URL: unknown option {option[:40]!r}; known options: {known}"
            raise BrokerRefused(msg)

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
        bounds = f"of at least {at_least:g}" + (
            "" if at_most == math.inf else f", at most {at_most:g}"
        )
        msg = f"CONSUMER_BROKER_URL: {option} must be a number {bounds}"
        raise BrokerRefused(msg)

    def whole_number(
        self, option: str, default: int, *, at_least: int = 1, at_most: int = 2**31
    ) -> int:
        """The option as a whole number between the two. Raises BrokerRefused."""
        number = self.number(option, default, at_least=at_least, at_most=at_most)
        if number != int(number):
            msg = f"CONSUMER_BROKER_URL: {option} must be a whole number"
            raise BrokerRefused(msg)
        return int(number)

    def flag(self, option: str, default: bool = False) -> bool:
        """The option as true or false. Raises BrokerRefused."""
        text = self.options.get(option, str(default).lower())
        if text not in ("true", "false"):
            msg = f"CONSUMER_BROKER_URL: {option} must be true or false"
            raise BrokerRefused(msg)
        return text == "true"

    @property
    def names_tls_files(self) -> bool:
        return any(option in self.options for option in TLS_OPTIONS)

    def tls_context(self) -> ssl.SSLContext:
        """To be called for each connection, since certificates are renewed on disk. Raises BrokerRefused."""
        return tls_context(*map(self.options.get, TLS_OPTIONS))


def tls_context(
    cafile: str | None, certfile: str | None = None, keyfile: str | None = None
) -> ssl.SSLContext:
    """A client's context that verifies the broker; paths of PEM files. Raises BrokerRefused."""
    try:
        context = ssl.create_default_context(cafile=cafile)
        if certfile is not None:
            context.load_cert_chain(certfile, keyfile, password="")  # else OpenSSL asks for one
    except (OSError, ValueError) as error:
        msg = f"CONSUMER_BROKER_URL: cafile, certfile or keyfile (without a passphrase): {error}"
        raise BrokerRefused(msg) from error
    return context


def _host(text: str, default_port: int | None) -> str:
    """``host:port``, with the default port if there is none. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port == 0 or parts.path:
        raise ValueError
    if parts.port is None and default_port is not None:
        return f"{text.rstrip(':')}:{default_port}"
    return text
