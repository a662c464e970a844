"""Connecting, on every broker: credentials, TLS, and invalid URLs."""

import io
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
import structlog

from facts import REQUEUES_ON_DISCONNECT
from harness.contract import Connect, take
from harness.servers import SERVED_BROKERS, Server
from harness.servers.local import free_port
from harness.servers.proxy import Proxy, proxy_type
from runtime.brokers.source import Source
from runtime.errors import BrokerError, BrokerRefused, BrokerUnavailable
from runtime.logs import configure_logs
from runtime.redaction import keep_secret, redacted
from runtime.settings import ConsumerSettings
from secured import CHECKS_NO_PASSWORD, TLS_OPTION, tls_files, with_user
from steps import (
    Event,
    ack_all,
    as_promised,
    eventually_logged,
    eventually_reconnected,
    publish,
    with_options,
)

pytestmark = pytest.mark.parametrize("broker", SERVED_BROKERS, indirect=True, scope="session")


async def test_a_user_and_a_password_may_have_any_character_and_are_in_no_log_and_no_error(
    connect: Connect,
    broker: Server,
    broker_name: str,
    login_url: str,
    events: list[Event],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with proxy_type(broker.url)(login_url) as proxy:
        async with connect(broker_url=proxy.url) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            proxy.refuse()
            await eventually_logged(events, "reconnecting")
            await source.ack(message)
            with pytest.raises(BrokerUnavailable) as unavailable:
                await publish(source, 1)
            proxy.resume()
            await eventually_reconnected(source, events)
            await publish(source, 1)
            await ack_all(source, 1 + (broker_name in REQUEUES_ON_DISCONNECT))
    said = f"{unavailable.value!r} {events} {caplog.text}"
    password = urlsplit(login_url).password or ""
    for secret in (password, unquote(password), quote(unquote(password))):
        assert secret not in said


async def test_a_wrong_password_is_one_sentence_without_it(
    source_for: Callable[..., Source], broker_name: str, login_url: str
) -> None:
    if reason := CHECKS_NO_PASSWORD.get(broker_name):
        pytest.skip(reason)
    user = unquote(urlsplit(login_url).username or "")
    with pytest.raises(BrokerRefused) as refused:
        await source_for(broker_url=with_user(login_url, user, "s3cret-s3cret")).__aenter__()
    assert "\n" not in str(refused.value)
    assert "s3cret" not in str(refused.value)


LIBRARIES = (
    *("aio_pika", "aiobotocore", "aiokafka", "aiormq", "asyncio", "asyncpg"),
    *("botocore", "nats", "paho", "redis", "urllib3"),
)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """The text that the runtime and the libraries have logged at DEBUG, as it leaves the process."""
    for name in LIBRARIES:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    output = io.StringIO()
    monkeypatch.setattr("sys.stdout", output)
    configure_logs("json", "debug")
    structlog.configure(cache_logger_on_first_use=False)
    yield output.getvalue
    structlog.reset_defaults()
    logging.basicConfig(force=True)


PLANTED = "s3cret/of@the=broker"


def where_nothing_listens(url: str) -> str:
    return f"localhost:{free_port()}"


def where_no_host_is(url: str) -> str:
    return f"nowhere.invalid:{urlsplit(url).port}"


@pytest.mark.parametrize("place", [where_nothing_listens, where_no_host_is])
async def test_no_error_of_a_client_that_cannot_connect_has_the_password(
    source_for: Callable[..., Source],
    settings_for: Callable[..., ConsumerSettings],
    broker: Server,
    shorten: Callable[..., None],
    logged: Callable[[], str],
    place: Callable[[str], str],
) -> None:
    shorten(1, "CONNECT_SECONDS", "ANSWER_SECONDS")
    parts = urlsplit(with_user(broker.url, "me", PLANTED))
    netloc = f"{parts.netloc.rpartition('@')[0]}@{place(broker.url)}"
    url = parts._replace(netloc=netloc).geturl()
    keep_secret(settings_for(broker_url=url))
    with pytest.raises(BrokerUnavailable) as failed:
        await source_for(broker_url=url).__aenter__()
    structlog.get_logger().error("start_failed", exc_info=failed.value)
    assert_nothing_leaked(failed.value, logged())


async def test_no_error_of_tls_has_the_password(
    source_for: Callable[..., Source],
    settings_for: Callable[..., ConsumerSettings],
    broker_name: str,
    tls_proxy: Proxy,
    certificates: Path,
    logged: Callable[[], str],
) -> None:
    url = with_files(broker_name, tls_proxy.url, certificates / "other.pem")
    if broker_name != "postgres":  # its user on this server has no password
        url = with_user(url, "me", PLANTED)
    keep_secret(settings_for(broker_url=url))
    with pytest.raises(BrokerError) as failed:
        await source_for(broker_url=url).__aenter__()
    structlog.get_logger().error("start_failed", exc_info=failed.value)
    assert_nothing_leaked(failed.value, logged())


async def test_no_error_of_publishing_has_the_password(
    connect: Connect,
    settings_for: Callable[..., ConsumerSettings],
    broker: Server,
    broker_name: str,
    login_url: str,
    shorten: Callable[..., None],
    logged: Callable[[], str],
) -> None:
    shorten(1, "CONNECT_SECONDS", "ANSWER_SECONDS")
    if broker_name == "sqs":  # its server accepts any keys
        login_url = with_user(login_url, "me", PLANTED)
    keep_secret(settings_for(broker_url=login_url))
    with proxy_type(broker.url)(login_url) as proxy:
        async with connect(broker_url=proxy.url) as source:
            await publish(source, 1)
            proxy.refuse()
            with pytest.raises(BrokerUnavailable) as failed:
                await publish(source, 1)
            structlog.get_logger().error("publish_failed", exc_info=failed.value)
    assert_nothing_leaked(failed.value, logged(), unquote(urlsplit(login_url).password or ""))


def assert_nothing_leaked(error: BaseException, output: str, secret: str = PLANTED) -> None:
    assert "_failed" in output
    said = output + redacted("".join(traceback.format_exception(error))) + str(error)
    for form in (secret, quote(secret), quote(secret, safe=""), secret[:6]):
        assert form not in said


@pytest.mark.parametrize(
    "rest",
    ["me:s3cret#s3cret@host", "me:1/s3cret@host", "me:s3cret?s3cret@host", "me@host:s3cret"],
)
def test_an_invalid_url_is_one_sentence_that_does_not_repeat_it(
    source_for: Callable[..., Source], broker: Server, rest: str
) -> None:
    with pytest.raises(BrokerRefused, match=r"^CONSUMER_BROKER_URL: .*$") as refused:
        source_for(broker_url=f"{urlsplit(broker.url).scheme}://{rest}")
    assert "s3cret" not in "".join(traceback.format_exception(refused.value))


def with_files(broker: str, url: str, *files: Path) -> str:
    """The URL with TLS, and the files of the CA, of the client's certificate and of its key."""
    named = dict(zip(tls_files(broker), files, strict=False))
    return with_options(url, TLS_OPTION.get(broker, ""), **named)


async def test_tls_with_a_ca_and_a_client_certificate(
    connect: Connect,
    broker: Server,
    broker_name: str,
    tls_proxy: Proxy,
    certificates: Path,
    events: list[Event],
    shorten: Callable[..., None],
) -> None:
    files = [certificates / name for name in ("ca.pem", "client.pem", "client.key")]
    async with connect(broker_url=with_files(broker_name, tls_proxy.url, *files)) as source:
        published = await publish(source, 10)
        assert as_promised(source, await ack_all(source, 10)) == as_promised(source, published)
        tls_proxy.refuse()
        await eventually_logged(events, "reconnecting")
        tls_proxy.resume()
        await eventually_reconnected(source, events)
        (last_id,) = await publish(source, 1)
        while last_id not in await ack_all(source, 1):
            assert broker_name in REQUEUES_ON_DISCONNECT  # an ack may have been lost on its way
        shorten(0.3, "STOP_SECONDS", "CANCEL_SECONDS", "FLUSH_SECONDS", "CLOSE_SECONDS")
        tls_proxy.black_hole()
        began_at = time.monotonic()
        await source.stop()
    assert time.monotonic() - began_at < 2.5


@pytest.mark.parametrize(
    "files",
    [(), ("other.pem",), ("missing.pem",), ("ca.pem", "client.pem", "server.key")],
    ids=["no CA", "another CA", "no such file", "the key of another certificate"],
)
async def test_impossible_tls_is_one_sentence(
    source_for: Callable[..., Source],
    broker_name: str,
    tls_proxy: Proxy,
    certificates: Path,
    files: tuple[str, ...],
) -> None:
    if len(files) > len(tls_files(broker_name)):
        pytest.skip("the broker takes no client certificate")
    paths = [certificates / file for file in files]
    with pytest.raises(BrokerRefused, match=r"(?i)certificate|file|key") as refused:
        await source_for(broker_url=with_files(broker_name, tls_proxy.url, *paths)).__aenter__()
    assert "\n" not in str(refused.value)


async def test_a_connection_without_the_required_client_certificate_is_refused(
    source_for: Callable[..., Source], broker_name: str, tls_proxy: Proxy, certificates: Path
) -> None:
    if len(tls_files(broker_name)) == 1:
        pytest.skip("the broker takes no client certificate")
    url = with_files(broker_name, tls_proxy.url, certificates / "ca.pem")
    with pytest.raises(BrokerError, match=f"localhost:{tls_proxy.port}"):
        await source_for(broker_url=url).__aenter__()
