# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Masks secrets in all text that leaves the process: logs, standard error, reasons, probe pages, spans, commands.

Two kinds are masked: *known* secrets in any escaped form, and text that looks like a secret by its position or name.
"""

import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel

_NAME = (
    r"pass(?:word|wd|phrase)|pwd|secret|token|(?:api|access|private|account|signing|secret|shared|subscription)[_-]?key"
    r"|authorization|cookie|signature|credentials?"
)
_IS_ADDRESS = re.compile(r"\w+://[^@?]*")
_IS_SECRET = re.compile(rf"(?:{_NAME})$", re.I)
# The time is linear: a repetition is bounded, gives nothing back (of one character: ++), or has nothing required behind it. A group that
# gives nothing back would be simpler, but matches less than it should before Python 3.11.5, which Debian 12 has.
_NAMED = re.compile(
    rf"(?=[pstack])((?:{_NAME})(?:\\{{0,8}}[\"'])?\s{{0,3}}[=:]\s{{0,3}}"
    r"(?:(?:Bearer|Basic|Digest|Negotiate|Token)\s{1,3})?)"
    r"(?!(?<=:\s)(?-i:[A-Z][a-z]{1,20}\s[a-z]))"  # not a sentence, such as "password: Field required"
    r"(b?\"(?:[^\"\\]|\\.)*\"?|b?'(?:[^'\\]|\\.)*'?|\{[^{}]*+\}?"
    r"|(?P<escape>\\{1,8})[\"'](?:[^\"'\\]|(?!(?P=escape)[\"'])\\++[\"']?)*"
    r"|(?:[^\s\"'&#;,()\[\]{}<>\\]|\\(?![\"'nrt]))+)",
    re.I | re.S,
)
_IN_QUERY = re.compile(  # in a URL's query, also if another URL's query has that URL escaped
    rf"((?:[?&]|%(?:25){{0,3}}(?:3f|26))(?:[\w.-]{{0,40}}(?:{_NAME})|(?:aws)?access_?key_?id|auth|code|hmac|jwt|key|otp"
    r"|pass|pin|pw|session(?:_?id)?|sid|sig)(?:=|%(?:25){0,3}3d))((?:(?!%(?:25){0,3}26)[^\s&\"'<>#;])+)",
    re.I,
)
_HAS_NO_PLACE = re.compile(r"[^=:\s]*+")
_PATTERNS = (
    (_NAMED, r"\1***"),
    (_IN_QUERY, r"\1***"),
    (re.compile(r"(?<=://)[^/\s\"'<>]*@"), "***@"),
    (re.compile(r"\b(Bearer\s{1,3})(?!auth|token|realm|error)[\w.~+/=-]{6,}", re.I), r"\1***"),
    (re.compile(r"\b([Bb]asic )(?=[\w+/]{0,80}[A-Z0-9=])[\w+/=]{8,}"), r"\1***"),
    # The values that pydantic's errors quote come from messages.
    (re.compile(r"input_value=(?:.*(, input_type=)|.*)"), r"input_value=***\1"),
)
_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
_SHORTEST = 4
_LONGEST = 10_000

_known: set[str] = set()
_any_known: re.Pattern[str] | None = None


def redacted(text: str) -> str:
    """The text with every secret in it masked."""
    if _any_known is not None:  # before the patterns, which would leave half of p@ss
        text = _any_known.sub("***", text)
    for pattern, mask in () if _HAS_NO_PLACE.fullmatch(text) else _PATTERNS:
        text = pattern.sub(mask, text)
    return text


def redacted_value(value: Any, name: str = "") -> Any:
    """The value for a log, a page or a span: its text is redacted and shortened; ``name`` is its key."""
    if value is None or isinstance(value, bool):
        return value
    if _IS_SECRET.search(name):
        return "***"
    if isinstance(value, int | float):
        return value
    if isinstance(value, dict):
        return {redacted_value(str(k)): redacted_value(item, str(k)) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_value(item) for item in value]
    text = redacted(value if isinstance(value, str) else repr(value))
    if len(text) <= _LONGEST:
        return text
    # Keep both ends: brokers allow ids of a megabyte.
    return f"{text[: _LONGEST // 2]} [{len(text)} characters] {text[-_LONGEST // 2 :]}"


def keep_secret(value: Any) -> None:
    """Mask from now on each secret in these settings, however deep, and the credentials of each URL and DSN."""
    global _any_known
    found = set(_secrets_in(value))
    found |= {secret.strip() for secret in found} | set(map(unquote, found))
    _known.update(secret for secret in found if len(secret) >= _SHORTEST)
    longest_first = sorted(_known, key=lambda secret: (-len(secret), secret))
    _any_known = re.compile("|".join(map(_in_any_form, longest_first))) if _known else None


def install() -> None:
    """At start: mask the secrets of the environment, and those in tracebacks that the interpreter prints."""

    def show(*args: Any) -> None:
        error = args if len(args) == 3 else args[0][:3]
        sys.stderr.write(redacted("".join(traceback.format_exception(*error))))

    for module, hook in ((sys, "excepthook"), (threading, "excepthook"), (sys, "unraisablehook")):
        if getattr(module, hook) is getattr(module, f"__{hook}__"):  # not the service's own
            setattr(module, hook, show)
    keep_secret({"secret": [os.environ.get(name) for name in _ENVIRONMENT]})


def _secrets_in(value: Any, name: str = "") -> Iterator[str]:
    if hasattr(value, "get_secret_value"):  # SecretStr, SecretBytes, Secret[...]
        text = value.get_secret_value()
        is_address = name == "broker_url" and _IS_ADDRESS.fullmatch(text)  # errors name the address
        yield from _secrets_in(text, name if is_address else "secret")
    elif isinstance(value, Mapping | BaseModel):
        for key, item in value.items() if isinstance(value, Mapping) else value:
            yield from _secrets_in(item, name if _IS_SECRET.search(name) else str(key))
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _secrets_in(item, name)
    elif value is not None and not isinstance(value, bool | int | float):
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        if _IS_SECRET.search(name):
            yield text
        named = _NAMED.findall(text) + _IN_QUERY.findall(text)  # in a DSN, or in a URL's query
        yield from (found.strip("\"'{}").replace("\\'", "'") for _, found, *_ in named)
        scheme, separator, rest = text.partition("://")
        # Not by urlsplit, which does not recognize a password with an unescaped / or #: it must be masked too.
        for part in (re.split("[/?#]", rest)[0], rest) if separator else ():
            user, colon, password = part.rpartition("@")[0].partition(":")
            is_token = not colon and scheme.lower() in ("nats", "tls")
            yield user if is_token else password


def _in_any_form(secret: str) -> str:
    """A regular expression: each character as it is, percent-encoded, or escaped as by JSON and by repr."""
    parts = re.findall(r"[A-Za-z0-9]+|\\+|.", secret, re.S)
    forms = (_form_of(part, before) for before, part in pairwise(["", *parts]))
    return f"{re.escape(secret)}|{''.join(forms)}"


def _form_of(part: str, before: str) -> str:
    if part.isascii() and part.isalnum():
        return part
    if part[0] == "\\":  # each escape of an escape doubles them
        return rf"(?:\\|%(?:25){{0,3}}5[Cc]){{{len(part)},{8 * len(part) + 8}}}"
    utf8, utf16 = (part.encode(code, "surrogatepass") for code in ("utf-8", "utf-16-be"))
    percent = "".join(rf"%(?:25){{0,3}}{byte:02x}" for byte in utf8) + "|\\+" * (part == " ")
    escapes = {part, repr(part)[1:-1].lstrip("\\"), json.dumps(part)[1:-1].lstrip("\\")}
    codes = [[f"x{byte:02x}" for byte in utf8]]
    codes.append([f"u{utf16[i : i + 2].hex()}" for i in range(0, len(utf16), 2)])
    escaped = "|".join([*map(re.escape, escapes), *map(r"\\{0,8}".join, codes)])
    own = "" if before[:1] == "\\" else r"\\{0,8}+"  # backslashes in ``before`` match these too
    return rf"(?i:{own}(?:{escaped})|{percent})"
