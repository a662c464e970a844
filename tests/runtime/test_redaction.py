"""No secret leaves the process: not by a log, a reason, a dead letter, a page, a command, or standard error."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, quote_plus

import pytest
import structlog
from botocore.exceptions import ClientError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretBytes, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from consumer_harness import consume
from harness.contract import opened
from harness.process import IMPORTED_FROM
from runtime import redaction
from runtime.brokers import make_source
from runtime.brokers.requests import Requests
from runtime.brokers.sqs import SqsRequests
from runtime.consumer import _storable
from runtime.errors import SettingsError
from runtime.handlers import Router
from runtime.logs import configure_logs
from runtime.message import Message, OutgoingMessage, Reject
from runtime.redaction import keep_secret, redacted, redacted_value
from runtime.service import tell_failed_start
from runtime.settings import ConsumerSettings, load_settings
from runtime.suspects import name_in_flight
from steps import start_once

# -- known secrets


SECRETS = st.text(st.characters(exclude_characters="*"), min_size=4, max_size=40).filter(
    lambda text: text == text.strip()
)


def forms_of(secret: str) -> list[str]:
    """The secret in the forms that programs write, also the form of a form."""
    written = secret.encode("utf-8", "surrogatepass")
    escaped = [
        repr(secret)[1:-1],
        repr(written)[2:-1],
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        quote(written, safe=""),
        quote(written),
        quote_plus(written),
        quote(written, safe="").lower() if secret.islower() else quote(written, safe="!$&'()*+,"),
    ]
    return [secret, *escaped, *(repr(form)[1:-1] for form in escaped), quote(quote(written))]


def test_no_pattern_has_a_possessive_or_atomic_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.11.5 such a group matches less than it should, and Debian 12 has 3.11.2."""
    monkeypatch.setattr(redaction, "_known", set())
    monkeypatch.setattr(redaction, "_any_known", None)
    keep_secret({"token": "a\\:%'b"})
    for pattern in (redaction._any_known, *(pattern for pattern, _ in redaction._PATTERNS)):
        assert pattern is not None
        assert not re.search(r"(?<!\\)\)(?:[*+?]|\{[0-9,]+\})\+|\(\?>", pattern.pattern)


@given(secret=SECRETS, before=st.text(max_size=20), after=st.text(max_size=20))
@example("p@ss/w?r#d:%", "amqp://u:", "@h/")
@example('"""\'', "\\", "\\")
@example("\\\\\\n\n", "\\\\", "\\")
@example("%25%", "%", "25")
@example("0\\:0", "", "")
@example("käse\U0001f600\x7f", "", "")
@settings(max_examples=500)
def test_a_known_secret_leaves_in_no_form(secret: str, before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("runtime.redaction._known", set())
        patched.setattr("runtime.redaction._any_known", None)
        keep_secret({"token": secret})
        for form in forms_of(secret):
            masked = redacted(before + form + after)
            assert form not in masked or form in before + "***" + after, form


HOSTILE = [
    "a",
    "\\",
    '"',
    "'",
    "%",
    "%25",
    "password",
    "password=",
    'password="',
    "token:",
    "token:\t",
    "secret='",
    "://",
    "://@",
    "Bearer\t",
    "Bearer\ta",
    "Basic\t",
    "Basic\tA",
    "input_value=",
    "input_value=,\tinput_type",
    "=",
    "{",
    "pwd={",
    '\\"',
    'token=\\"',
    'token=\\\\\\"',
    "\\\\\\",
    "\t",
    "?",
    '""',
    "?sig=",
    "&aaaaaaaaaa.token",
    "%3Fsig%3D",
    "?a%26",
    "%2525",
]


@pytest.mark.parametrize("part", HOSTILE)
def test_half_a_megabyte_of_hostile_text_takes_linear_time(part: str) -> None:
    """With quadratic time, one of these would exceed the time limit of a test."""
    for secret in ('p@ss w"ord', "\\\\\\x", "%%%%", '""""', "aaaaab", "    x"):
        keep_secret({"token": secret})
    text = (part.replace("\t", " ") * 500_000)[:500_000]
    assert len(redacted(text)) <= 2_000_000


class Database(BaseModel):
    url: SecretStr = SecretStr("postgresql://app:nested%2Fpassword@db/orders")
    options: dict[str, SecretStr] = {"sslpassword": SecretStr("in-a-dict")}


class Own(BaseSettings):
    """A service's own settings."""

    model_config = SettingsConfigDict(env_prefix="OWN_")
    database: Database = Database()
    keys: list[SecretStr] = [SecretStr("first-key"), SecretStr("second-key")]
    blob: SecretBytes = SecretBytes(b"caf\xc3\xa9-bytes")
    dsn: SecretStr = SecretStr("host=db password='lib pq' user=app")
    api_key: str = "plain-api-key"
    cache: str = "redis://:cache-password@cache:6379/0"
    upload: str = "https://blobs/x?sv=1&sig=signed%2Fupload&n=1"
    name: str = "visible"
    max_token: int = 4096
    verify_token: bool = True

    @field_validator("dsn")
    @classmethod
    def _check(cls, value: SecretStr) -> SecretStr:
        if "host" not in value.get_secret_value():
            msg = f"no host in {value.get_secret_value()}"
            raise ValueError(msg)
        return value


OWN_SECRETS = [
    "nested%2Fpassword",
    "nested/password",
    "in-a-dict",
    "first-key",
    "second-key",
    "café-bytes",
    "lib_pq",
    "plain-api-key",
    "cache-password",
    "signed%2Fupload",
    "signed/upload",
]


def test_every_secret_of_the_settings_is_known() -> None:
    load_settings(Own)
    for secret in OWN_SECRETS:
        assert redacted(f"got {secret.replace('_', ' ')}!") == "got ***!"
    assert redacted("visible True 4096") == "visible True 4096"


def test_the_address_of_a_broker_is_shown_unless_credentials_are_in_it() -> None:
    """Otherwise each error would begin with ``***``, and not name the place."""
    for url in ("nats://broker-7:4222", "nats://t0ken@broker-7:4222", "amqp://me:s3cret@broker-7"):
        load_settings(ConsumerSettings, broker_url=url)
    said = "nats://broker-7:4222: timed out; t0ken, s3cret, nats://t0ken@broker-7:4222"
    assert redacted(said) == "nats://broker-7:4222: timed out; ***, ***, ***"


def test_a_validator_that_quotes_a_secret_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_DSN", "quoted-secret")
    with pytest.raises(SettingsError, match=r"^OWN_DSN: no host in \*\*\*$"):
        load_settings(Own)


# -- secrets by their place


@pytest.mark.parametrize(
    "text",
    [
        "connection to amqp://app:PLANTED@host/ failed",
        "GET https://host/v1?api_key=PLANTED&page=2 failed",
        "https://bucket/x?X-Amz-Credential=PLANTED&X-Amz-Signature=PLANTED&X-Amz-Security-Token=PLANTED",
        "https://blobs/x?sv=2026-01-01&sig=PLANTED%2FPLANTED%3D&se=2026-12-01",
        "https://bucket/x?AWSAccessKeyId=PLANTED&Signature=PLANTED&Expires=1",
        "GET /v1/x?key=PLANTED&page=2 and /y?token=PLANTED",
        "https://login/callback?code=PLANTED&state=1, then ?id_token=PLANTED&session_id=PLANTED",
        "https://host/?sid=PLANTED&auth=PLANTED&jwt=PLANTED&pw=PLANTED&pin=PLANTED&otp=PLANTED",
        "https://proxy/?to=https%3A%2F%2Fblobs%2Fx%3Fsig%3DPLANTED%26n%3D1",
        "https://proxy/?to=https%253A%252F%252Fblobs%252Fx%253Fa%253D1%2526token%253DPLANTED",
        "host=db password=PLANTED user=app",
        "host=db password = 'PLANTED with spaces \\' PLANTED' user=app",
        "jdbc:postgresql://host/db?user=app&password=PLANTED",
        "Driver={ODBC};Server=db;UID=app;PWD={PLANTED;PLANTED};Encrypt=yes",
        "Endpoint=sb://x/;SharedAccessKey=PLANTED/PLANTED=",
        "Authorization: Bearer PLANTED.PLANTED",
        "{'Authorization': 'Basic UExBTlRFRA==PLANTED'}",
        "Headers({'x-api-key': 'PLANTED', 'accept': '*/*'})",
        "the header Bearer PLANTED-1.PLANTED was refused",
        "Basic cGxhbnRlZA0PLANTED was refused",
        "X-Auth-Token: PLANTED",
        "client_secret=PLANTED, scope=all",
        "aws_secret_key=PLANTED and SharedKey=PLANTED",
        '{"private_key": "-----BEGIN\\nPLANTED\\n-----END", "user": 1}',
        json.dumps({"body": json.dumps({"password": 'PLANTED"PLANTED', "user": 1})}),
        repr({"password": b"PLANTED 'PLANTED"}),
        "1 validation error for X\na\n  Input should be [type=int, input_value='PLANTED', input_type=str]",
        "cut off [type=int, input_value='PLANTED",
    ],
)
def test_a_secret_is_masked_by_its_place(text: str) -> None:
    masked = redacted(text)
    assert "PLANTED" not in masked
    assert "***" in masked


@pytest.mark.parametrize(
    "text",
    [
        "invalid payload: password: Field required; token: Input should be a valid string",
        "password authentication failed for user app",
        "Basic authentication is off; Bearer token missing; tokens=512",
        "http://localhost is for me@example.org",
        "order 7: the key of the item is not secret",
        "2026-11-29T19:30:00Z partition=3 offset=12 key=customer-7 code=4 session=3",
        "https://host/orders?monkey=1&barcode=2&pinned=yes&design=old&sort=code",
    ],
)
def test_other_text_is_unchanged(text: str) -> None:
    assert redacted(text) == text


def test_values_under_the_name_of_a_secret_are_masked() -> None:
    value = {"password": 12345678, "headers": {"Authorization": ["b"], "accept": "c"}, "pieces": 7}
    assert redacted_value({**value, "needs_password": True, "token": None}) == {
        "password": "***",
        "headers": {"Authorization": "***", "accept": "c"},
        "pieces": 7,
        "needs_password": True,
        "token": None,
    }


# -- a cut


CUT = "the-secret-that-is-cut"


def of_requests(text: str) -> str:
    return str(Requests("broker", ()).translated(OSError(text)))


def of_sqs(text: str) -> str:
    answer = {"Error": {"Code": "Bad", "Message": text}, "ResponseMetadata": {}}
    return str(SqsRequests("sqs", ()).translated(ClientError(cast(Any, answer), "Send")))


class Quoting(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def _check(cls, text: str) -> str:
        msg = f"no such {text}"
        raise ValueError(msg)


async def quoting(payload: Quoting) -> None: ...


def of_an_unknown_type(text: str) -> str:
    with pytest.raises(Reject) as rejected:
        Router({"a": quoting, "b": quoting}).route(Message(b"", "1", text, {}, 1))
    return _storable(str(rejected.value))


def of_a_payload(text: str) -> str:
    message = Message(json.dumps({"text": text}).encode(), "1", "a", {}, 1)
    with pytest.raises(Reject) as rejected:
        Router({"a": quoting}).route(message).decode(message)
    return _storable(str(rejected.value))


def of_a_failure(text: str) -> str:
    return _storable(text)


def of_the_termination_message(text: str) -> str:
    message = Message(b"", text, "a", {}, 1)
    message.deliveries = 2
    name_in_flight({message: "a"})
    return Path(os.environ["TERMINATION_MESSAGE_PATH"]).read_text()


def of_a_log(text: str) -> str:
    return str(redacted_value(text * 20))


@pytest.mark.parametrize(
    "shown",
    [
        *(of_requests, of_sqs, of_an_unknown_type, of_a_payload),
        *(of_a_failure, of_the_termination_message, of_a_log),
    ],
)
def test_a_secret_is_masked_before_the_text_is_cut(
    shown: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of the secret is left, at any position of the cut."""
    (tmp_path / "message").touch()
    monkeypatch.setenv("TERMINATION_MESSAGE_PATH", str(tmp_path / "message"))
    keep_secret({"token": CUT, "key_of_two_lines_secret": "first-line\nsecond-line"})
    for before in range(560):
        text = redacted(shown("x" * before + CUT + "y" * 600))
        assert "the-" not in text, before
    assert "first-line" not in redacted(shown("no access with first-line\nsecond-line"))


def test_the_termination_message_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERMINATION_MESSAGE_PATH", str(tmp_path / "message"))
    (tmp_path / "message").touch()
    keep_secret({"token": "known-secret"})
    tell_failed_start(SettingsError("known-secret at amqp://a:PLANTED@b"), "json")
    assert (tmp_path / "message").read_text() == "*** at amqp://***@b"


# -- every channel


class Strict(BaseModel):
    number: int


def failures() -> Iterator[Callable[[], object]]:
    """Errors of client libraries, each with a planted secret."""
    texts = [
        f"could not connect to postgres://app:{OWN_SECRETS[0]}@db/x",
        "the server said lib pq",
        "connection to host=db password=PLANTED failed",
        "Client error '401' for url 'https://api/?api_key=PLANTED' {'Authorization': 'Bearer PLANTED'}",
        json.dumps({"password": "PLANTED", "detail": OWN_SECRETS[5]}),
    ]
    for text in texts:
        yield lambda text=text: _raise(RuntimeError(text))  # type: ignore[misc]
        yield lambda text=text: _raise(ExceptionGroup("several", [KeyError(text), OSError(text)]))  # type: ignore[misc]
    word = "PLANTED"  # a traceback shows lines of the source
    yield lambda: Strict.model_validate({"number": word})


def _raise(error: Exception) -> None:
    try:
        raise error
    except Exception as cause:
        msg = f"while handling: {cause!r}"
        raise ValueError(msg) from cause


def leaks(text: str) -> list[str]:
    secrets = ["PLANTED", *(secret.replace("_", " ") for secret in OWN_SECRETS)]
    return [secret for secret in secrets if secret in text or json.dumps(secret)[1:-1] in text]


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_no_channel_of_a_consumer_has_a_secret_on_any_broker(
    settings_for: Callable[..., ConsumerSettings],
    capsys: pytest.CaptureFixture[str],
    log_format: str,
) -> None:
    load_settings(Own)
    made = settings_for(
        max_attempts=2, retry_seconds=0.1, retry_max_seconds=0.4, breaker_failures=0
    )
    raised, seen = list(failures()), list[object]()

    async def fail(body: bytes, message: Message) -> None:
        seen.append(dict(message.headers))
        raised[int(body)]()

    await start_once(made)
    async with opened(make_source(made)) as publisher:
        bodies = [str(number).encode() for number in range(len(raised))]
        await publisher.publish([OutgoingMessage(body, "fail") for body in bodies])
        await publisher.publish([OutgoingMessage(b"0", f"password=PLANTED {OWN_SECRETS[2]}")])
    configure_logs("json" if log_format == "json" else "console", "debug")
    structlog.configure(cache_logger_on_first_use=False)
    total = len(raised) + 1
    source = make_source(made, 20)
    try:
        handlers = {"fail": fail, "other": fail}
        consumer = await consume(source, made, lambda c: c.rejected_count >= total, handlers)
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    assert consumer.rejected_count == total
    output = capsys.readouterr().out
    assert "while handling" in output
    assert not leaks(output), [line for line in output.splitlines() if leaks(line)]
    assert len(seen) == 2 * len(raised)
    assert not leaks(str(seen))
    if not source.capabilities.dead_letters:
        return
    async with opened(make_source(made)) as reader:
        reasons = [letter.reason async for letter in reader.dead_letters(50)]
    assert len(reasons) == total
    assert not leaks(" ".join(reasons))


PROGRAM = """
import sys, threading
from runtime import redaction
redaction.install()
redaction.keep_secret({"token": "known-secret"})
class Broken:
    def __del__(self):
        raise RuntimeError("known-secret of a destructor")
def fail():
    raise OSError("known-secret of a thread, host=x password=PLANTED")
thread = threading.Thread(target=fail); thread.start(); thread.join()
Broken()
raise KeyError("known-secret of the program") from ValueError("PGPASSWORD-of-libpq at amqp://a:PLANTED@b")
"""


@pytest.mark.slow
def test_no_traceback_of_the_interpreter_has_a_secret() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTED_FROM)}
    environment["PGPASSWORD"] = "PGPASSWORD-of-libpq"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    for where in ("a destructor", "a thread", "the program"):
        assert f"*** of {where}" in done.stderr
    assert "ValueError: *** at amqp://***@b" in done.stderr
    assert "PLANTED" not in done.stderr
    assert done.stderr.count("Traceback") == 3
