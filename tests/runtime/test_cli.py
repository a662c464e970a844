"""The command line: the effect of each command on a real broker, its output, and its exit code."""

import asyncio
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from pydantic import BaseModel
from pydantic_settings import BaseSettings, SettingsConfigDict

from harness.contract import need, opened
from harness.process import Ledger, service_command, service_environment
from harness.scene import wait_until
from harness.servers import SERVED_BROKERS, Server
from runtime import service
from runtime.brokers import make_source
from runtime.brokers.source import Source
from runtime.cancellation import CancellationEvent
from runtime.errors import BrokerRefused
from runtime.handlers import HandlerFunction
from runtime.message import Message
from runtime.operate import cli, console
from runtime.operate.cli import Service, main
from runtime.operate.console import AT_ONCE, Progress
from runtime.operate.vendored import ADVICE
from runtime.settings import ConsumerSettings
from steps import start_once, with_options

on_one_broker = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)


class Order(BaseModel):
    id: str


async def handle(event: Order, message: Message) -> None: ...


async def handle_many(events: list[Order]) -> None: ...


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ORDERS_")
    limit: int = 3


ONE: dict[str, HandlerFunction] = {"order_created": handle}
TWO: dict[str, HandlerFunction] = {"order_created": handle, "payment_received": handle}

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("CONSUMER_", "ORDERS_"))]:
        monkeypatch.delenv(name)
    yield
    structlog.reset_defaults()
    logging.basicConfig(force=True, handlers=[logging.NullHandler()])


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; gives the exit code, standard output and standard error."""

    def call(
        *argv: str, handlers: dict[str, HandlerFunction] = ONE, **more: Any
    ) -> tuple[int, str, str]:
        capsys.readouterr()  # drop earlier output of the test
        try:
            service = Service(name="orders", handlers=handlers, settings_class=Settings, **more)
            exit_code = main(service, argv)
        except SystemExit as usage:  # from argparse
            exit_code = int(usage.code or 0)
        output = capsys.readouterr()
        return exit_code, output.out, output.err

    return call


@pytest.fixture
def command(call: Call, broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch) -> Call:
    """As `call`, with a broker."""
    monkeypatch.setenv("CONSUMER_BROKER_URL", broker.url)
    monkeypatch.setenv("CONSUMER_SOURCE", queue)
    monkeypatch.setenv("CONSUMER_GROUP", queue)
    asyncio.run(declare(settings_of(broker, queue)))
    return call


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Gives a command its standard input."""
    with ExitStack() as files:

        def stdin(content: bytes) -> None:
            path = tmp_path / "stdin"
            path.write_bytes(content)
            monkeypatch.setattr("sys.stdin", files.enter_context(path.open()))

        yield stdin


def settings_of(broker: Server, queue: str) -> ConsumerSettings:
    return ConsumerSettings.model_validate({"broker_url": broker.url, "source": queue})


async def declare(settings: ConsumerSettings) -> None:
    await start_once(settings)
    async with opened(make_source(settings)):
        pass


async def make_dead(broker: Server, queue: str, count: int, reason: str = "reason") -> None:
    async with opened(make_source(settings_of(broker, queue), prefetch=count)) as source:
        await source.start()
        for number in range(count):
            await source.reject(await anext(source), f"{reason} {number}")
        await source.stop()


def wait_for_dead(broker: Server, queue: str, count: int) -> None:
    """Wait for the broker, which may count published, listed or requeued messages a moment later."""
    give_up_at = time.monotonic() + 20
    while broker.counts(queue).dead != count:
        assert time.monotonic() < give_up_at, broker.counts(queue)
        time.sleep(0.05)


# -- prefetch


@pytest.mark.parametrize(
    ("handle", "variables", "expected"),
    [
        (handle, {"CONCURRENCY": "3"}, 3),
        (handle, {"CONCURRENCY": "3", "PREFETCH": "7"}, 7),
        (handle_many, {"CONCURRENCY": "3", "BATCH_SIZE": "5"}, 15),
        (handle, {"CONCURRENCY": "3", "ORDER_BY": "body:id"}, 30),
        (handle_many, {"CONCURRENCY": "1000", "BATCH_SIZE": "1000"}, 65_535),
    ],
    ids=["concurrency", "as it is set", "batches", "ordered", "what AMQP can say"],
)
def test_as_many_messages_are_prefetched_as_can_be_in_flight_unless_it_is_set(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    handle: HandlerFunction,
    variables: dict[str, str],
    expected: int,
) -> None:
    taken: list[int] = []

    def make_source(settings: ConsumerSettings, prefetch: int) -> Source:
        taken.append(prefetch)
        raise BrokerRefused("enough")

    monkeypatch.setattr(service, "make_source", make_source)
    monkeypatch.setattr(service, "make_cancellation_event", lambda _, loop: CancellationEvent(loop))
    where = {"BROKER_URL": "sqlite:///queues.db", "SOURCE": "orders"}
    for name, value in {**where, **variables}.items():
        monkeypatch.setenv(f"CONSUMER_{name}", value)
    call("run", handlers={"order_created": handle})
    assert taken == [expected]


# -- usage


def test_version_names_the_service_the_template_and_its_brokers_without_any_setting(
    call: Call,
) -> None:
    """tests/test_install.py tests the same for an installed service."""
    exit_code, out, _ = call("--version")
    assert exit_code == 0
    said = re.fullmatch(r"orders unknown \(cookiecutter-consumer [\d.]+, (.*)\)\n", out)
    assert said
    assert sorted(said[1].split(", ")) == sorted(SERVED_BROKERS)


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["publish"], ["dead-letters"], ["dead-letters", "list", "--limit", "x"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2(call: Call, argv: list[str]) -> None:
    exit_code, out, err = call(*argv)
    assert (exit_code, out) == (2, "")
    assert err.startswith("usage: orders")


@pytest.mark.parametrize(
    "argv", [["run"], ["check"], ["publish", "{}"], ["dead-letters", "list"]], ids=" ".join
)
def test_without_a_broker_url_no_command_falls_back_to_the_embedded_broker(
    call: Call, argv: list[str], tmp_path: Path
) -> None:
    exit_code, out, err = call(*argv)
    assert (exit_code, err) == (2, "orders: CONSUMER_BROKER_URL: is not set\n")
    assert [json.loads(line)["event"] for line in out.splitlines()] == (
        ["start_failed"] if argv == ["run"] else []
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("CONSUMER_CONCURRENCY", "0", "CONSUMER_CONCURRENCY: Input should be greater than"),
        ("ORDERS_LIMIT", "many", "ORDERS_LIMIT: Input should be a valid integer"),
        ("CONSUMER_BROKER_URL", "pigeon://h", "CONSUMER_BROKER_URL: unknown scheme 'pigeon'"),
        ("CONSUMER_BROKER_URL", "orders", "CONSUMER_BROKER_URL: unknown scheme ''"),
        ("CONSUMER_BROKER_URL", "pigeon://me:x[@h", "CONSUMER_BROKER_URL: unknown scheme 'pigeon'"),
        ("CONSUMER_BROKER_URL", "sqlite://", "CONSUMER_BROKER_URL"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(
    call: Call, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", "sqlite:///queue.db")
    monkeypatch.setenv(variable, value)
    exit_code, _, err = call("check")
    assert exit_code == 2
    assert err.startswith(f"orders: {sentence}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["environment", ".env", "file"])
def test_the_password_is_masked_wherever_the_url_was_set(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    url = f"sqlite:///{tmp_path}/queue.db?hunter22=1&password=hunter22"
    if place == "environment":
        monkeypatch.setenv("CONSUMER_BROKER_URL", url)
    elif place == ".env":
        (tmp_path / ".env").write_text(f"CONSUMER_BROKER_URL={url}\n")
    else:
        (tmp_path / "url").write_text(url)
        monkeypatch.setenv("CONSUMER_BROKER_URL_FILE", str(tmp_path / "url"))
    exit_code, _, err = call("check")
    assert (exit_code, err.count("unknown option '***'"), "hunter22" in err) == (2, 1, False)


def test_a_handler_with_an_unusable_signature_is_one_sentence_and_exit_code_2(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", "sqlite:///queue.db")
    exit_code, _, err = call("check", handlers={"order_created": lambda: None})
    assert exit_code == 2
    assert err.startswith("orders: handler 'order_created': cannot use the signature")
    assert err.count("\n") == 1


def test_queue_and_group_are_named_after_the_service_unless_settings_name_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", "sqlite:///queue.db")
    of_orders = Service(name="orders", handlers=ONE)
    assert (of_orders.settings().source, of_orders.settings().group) == ("orders", "orders")
    monkeypatch.setenv("CONSUMER_SOURCE", "q")
    monkeypatch.setenv("CONSUMER_GROUP", "g")
    assert (of_orders.settings().source, of_orders.settings().group) == ("q", "g")


# -- check


def test_check_validates_the_settings_and_the_broker_and_shows_the_queue(
    command: Call, broker: Server, queue: str
) -> None:
    exit_code, out, _ = command("check")
    assert exit_code == 0
    assert "settings   ok" in out
    assert queue in out
    can_requeue = make_source(settings_of(broker, queue)).capabilities.requeue
    assert f"supports   requeue: {'yes' if can_requeue else 'no'}\n" in out


def test_check_and_list_change_nothing_and_declare_creates_what_is_missing(
    call: Call, broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if broker.url.startswith("mqtt"):
        pytest.skip("a topic of MQTT is never created")
    # All queues of a database share tables, which other tests may have created: here this queue has its own tables.
    alone = {"sqlite": f"sqlite:///{tmp_path}/{queue}.db"}
    alone["postgres"] = with_options(broker.url, schema=queue)
    url = alone.get(broker.url.partition(":")[0], broker.url)
    monkeypatch.setenv("CONSUMER_BROKER_URL", url)
    monkeypatch.setenv("CONSUMER_SOURCE", queue)
    monkeypatch.setenv("CONSUMER_GROUP", queue)
    for _ in range(2):
        exit_code, out, err = call("check")
        assert exit_code == 1
        assert f"{queue}: does not exist\n" in out
        assert err == "orders: run `declare` or `run` to create what does not exist\n"
        assert call("dead-letters", "list") == (0, "", "0 of 0 dead letters\n")
        assert call("dead-letters", "purge", "--yes")[0] == 0
    exit_code, out, _ = call("declare")
    assert exit_code == 0
    assert f"{queue}: 0\n" in out
    exit_code, out, err = call("check")
    assert (exit_code, err) == (0, "")
    assert "does not exist" not in out


@on_one_broker
@pytest.mark.parametrize(
    "argv",
    [
        ["declare"],
        ["check"],
        ["publish", '{"order_id": 1}'],
        ["dead-letters", "replay", "--yes"],
        ["dead-letters", "purge", "--yes"],
    ],
    ids=" ".join,
)
def test_a_secret_in_the_name_of_the_source_is_masked(
    command: Call, queue: str, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """An example is the token of a device in a topic."""
    monkeypatch.setenv("PGPASSWORD", secret := f"hush-{queue}")
    monkeypatch.setenv("CONSUMER_SOURCE", f"devices/{secret}/status")
    exit_code, out, err = command(*argv)
    assert exit_code == 0
    assert "devices/***/status" in out + err
    assert secret not in out + err


@pytest.mark.parametrize("broker", SERVED_BROKERS, indirect=True)
def test_check_without_a_broker_is_exit_code_69_and_one_sentence(
    command: Call, broker: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = broker.url.partition(":")[0]
    monkeypatch.setenv("CONSUMER_BROKER_URL", f"{scheme}://me:hush-hush@127.0.0.1:1/")
    exit_code, out, err = command("check")
    assert exit_code == 69
    assert err.count("\n") == 1
    assert "hush-hush" not in out + err


@pytest.mark.parametrize(
    ("drift", "exit_code", "said"),
    [
        (([], 7), 0, "vendored   ok, 7 files are unmodified\n"),
        ((["edited: logs.py", ADVICE], 7), 1, f"edited: logs.py\n{ADVICE}\n"),
    ],
)
def test_check_vendored_says_whether_the_vendored_files_are_unmodified(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    drift: tuple[list[str], int],
    exit_code: int,
    said: str,
) -> None:
    monkeypatch.setattr(cli, "find_drift", lambda: drift)
    assert call("check", "--vendored") == (exit_code, said, "")


# -- publish


def test_publish_puts_one_message_into_the_queue(command: Call, broker: Server, queue: str) -> None:
    exit_code, _, err = command("publish", '{"id": "1"}')
    assert (exit_code, err) == (0, f"published 1 message to {queue}\n")
    assert broker.counts(queue).ready == 1


def test_publish_reads_json_lines(
    command: Call, broker: Server, queue: str, stdin: Callable[[bytes], None]
) -> None:
    lines = [json.dumps({"id": f"{number:0500}"}) for number in range(300)]  # two pipes are full
    stdin(("\n".join(lines) + "\n\n").encode())
    exit_code, _, err = command("publish", "-")
    assert (exit_code, err) == (0, f"published 300 messages to {queue}\n")
    assert broker.counts(queue).ready == 300


@on_one_broker
def test_a_line_that_is_not_json_is_named_and_those_before_it_are_published(
    command: Call, broker: Server, queue: str, stdin: Callable[[bytes], None]
) -> None:
    stdin(b'{"id": "1"}\n{"id": "2"}\nid=3\n{"id": "4"}')
    exit_code, _, err = command("publish", "-")
    assert exit_code == 2
    assert f"published 2 messages to {queue}\n" in err
    assert "orders: line 3 is not JSON" in err
    assert broker.counts(queue).ready == 2


@on_one_broker
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '"\udcff"', "\ufeff{}"],
    ids=["too deep", "not UTF-8", "with a byte order mark"],
)
def test_a_message_that_is_not_json_is_one_sentence(command: Call, text: str) -> None:
    exit_code, _, err = command("publish", text)
    assert (exit_code, err.count("not JSON")) == (2, 1)


@on_one_broker
def test_the_last_line_may_end_without_a_newline(
    command: Call, broker: Server, queue: str, stdin: Callable[[bytes], None]
) -> None:
    stdin(b'{"id": "1"}\n{"id": "2"}')
    assert command("publish", "-")[0] == 0
    assert broker.counts(queue).ready == 2
    stdin(b'{"id": "1"}\nid=2')
    assert "line 2 is not JSON" in command("publish", "-")[2]


@on_one_broker
def test_standard_input_that_cannot_be_read_is_one_sentence(
    command: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(fileno=lambda: directory))
    exit_code, _, err = command("publish", "-")
    os.close(directory)
    assert exit_code == 2
    assert "orders: standard input cannot be read" in err
    with (tmp_path / "closed").open("w") as closed:
        monkeypatch.setattr("sys.stdin", closed)
    exit_code, _, err = command("publish", "-")
    assert exit_code == 2
    assert "orders: standard input cannot be read: I/O operation on closed file" in err


@on_one_broker
@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_stream_that_was_closed_before_the_start_harms_no_command(
    command: Call, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    assert command("check")[0] == 0
    monkeypatch.setattr(f"sys.{stream}", None)
    assert command("publish", "{}")[0] == 0
    monkeypatch.setattr("sys.stdin", None)
    assert command("publish", "-")[0] == 0


@on_one_broker
def test_with_two_handlers_publish_needs_a_type(command: Call) -> None:
    exit_code, _, err = command("publish", "{}", handlers=TWO)
    assert exit_code == 2
    assert "--type is required" in err
    assert "order_created, payment_received" in err
    assert command("publish", "{}", "--type", "order_created", handlers=TWO)[0] == 0


@on_one_broker
def test_a_type_that_no_handler_takes_is_not_published(command: Call) -> None:
    exit_code, _, err = command("publish", "{}", "--type", "order_craeted", handlers=TWO)
    assert exit_code == 2
    assert (
        err
        == "orders: no handler takes the type 'order_craeted': order_created, payment_received\n"
    )
    for handlers in (ONE, {**TWO, "*": handle}):
        assert command("publish", "{}", "--type", "order_craeted", handlers=handlers)[0] == 0


# -- dead letters


def test_dead_letters_are_listed_with_their_reason_and_stay(
    command: Call, broker: Server, queue: str
) -> None:
    need(make_source(settings_of(broker, queue)), "dead_letters")
    for number in range(3):
        command("publish", json.dumps({"id": str(number)}), "--type", "order_created")
    asyncio.run(make_dead(broker, queue, 3))
    for _ in range(2):
        wait_for_dead(broker, queue, 3)
        exit_code, out, err = command("dead-letters", "list", "--limit", "2")
        letters = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert exit_code == 0
        assert [letter["reason"] for letter in letters] == ["reason 0", "reason 1"]
        assert {letter["type"] for letter in letters} == {"order_created"}
        assert "2 of 3 dead letters" in err


def test_a_secret_that_an_earlier_version_stored_is_not_listed(
    command: Call, broker: Server, queue: str
) -> None:
    need(make_source(settings_of(broker, queue)), "dead_letters")
    command("publish", "{}")
    asyncio.run(make_dead(broker, queue, 1, "no route to amqp://app:PLANTED@db, password=PLANTED"))
    wait_for_dead(broker, queue, 1)
    exit_code, output, _ = command("dead-letters", "list")
    assert exit_code == 0
    assert (
        json.loads(output.splitlines()[-1])["reason"] == "no route to amqp://***@db, password=*** 0"
    )


def test_progress_is_drawn_on_a_terminal_while_the_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0, 0.05, 0.2, 0.25, 0.4])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("published", "to orders") as progress:
        for _ in range(4):
            progress.advance(500)
    assert capsys.readouterr().err == (
        "\rpublished 1,000 (5,000/s)\rpublished 2,000 (5,000/s)"
        "\r\033[Kpublished 2,000 messages to orders\n"
    )


def test_dead_letters_are_replayed_or_purged_with_yes(
    command: Call, broker: Server, queue: str
) -> None:
    need(make_source(settings_of(broker, queue)), "dead_letters")
    for _ in range(2):
        command("publish", '{"id": "1"}')
    asyncio.run(make_dead(broker, queue, 2))
    exit_code, _, err = command("dead-letters", "replay", "--yes")
    assert (exit_code, err) == (0, f"replayed 2 messages to {queue}\n")
    wait_for_dead(broker, queue, 0)
    assert broker.counts(queue).ready == 2
    asyncio.run(make_dead(broker, queue, 2))
    exit_code, _, err = command("dead-letters", "purge", "--yes")
    assert exit_code == 0
    assert f"deleted 2 messages from the dead letters of {queue}\n" in err
    counts = broker.counts(queue)
    assert (counts.ready, counts.dead) == (0, 0)


@on_one_broker
def test_a_list_whose_reader_closes_the_pipe_ends_without_a_traceback(
    command: Call, broker: Server, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("publish", '{"id": "1"}')
    asyncio.run(make_dead(broker, queue, 1))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert command("dead-letters", "list")[0] == 128 + signal.SIGPIPE


@on_one_broker
@pytest.mark.parametrize("action", ["replay", "purge"])
def test_without_dead_letters_no_confirmation_is_asked(command: Call, action: str) -> None:
    exit_code, out, _ = command("dead-letters", action)
    assert exit_code == 0
    assert "no dead letters" in out


@on_one_broker
@pytest.mark.parametrize("action", ["replay", "purge"])
def test_without_yes_and_without_a_terminal_no_dead_letter_is_changed(
    command: Call, broker: Server, queue: str, stdin: Callable[[bytes], None], action: str
) -> None:
    command("publish", '{"id": "1"}')
    asyncio.run(make_dead(broker, queue, 1))
    stdin(b"y\n")
    exit_code, _, err = command("dead-letters", action)
    assert exit_code == 2
    assert "--yes" in err
    assert broker.counts(queue).dead == 1


@pytest.mark.slow
@on_one_broker
@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0), (b"\x04", 1)])
def test_on_a_terminal_purge_asks_first(
    broker: Server, queue: str, tmp_path: Path, call: Call, command: Call, answer: bytes, left: int
) -> None:
    command("publish", '{"id": "1"}')
    asyncio.run(make_dead(broker, queue, 1))
    terminal, program_side = pty.openpty()
    environment = service_environment(broker.url, queue, Ledger(tmp_path / "ledger"))
    with subprocess.Popen(
        service_command("dead-letters", "purge"),
        env=environment,
        cwd=tmp_path,
        stdin=program_side,
        stdout=program_side,
        stderr=program_side,
    ) as process:
        os.close(program_side)
        said = b""
        while b"[y/N]" not in said:
            said += os.read(terminal, 1000)
        os.write(terminal, answer)
        assert process.wait(30) == 0
    os.close(terminal)
    assert broker.counts(queue).dead == left


# -- demo


@pytest.mark.slow
def test_the_demo_ends_by_itself_and_accounts_for_every_message(call: Call) -> None:
    exit_code, out, _ = call("demo", examples={"order_created": b'{"id": "1"}'})
    assert exit_code == 0
    assert "published 20, handled 20, dead letters 0" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drain_seconds", "handler_seconds", "bar", "mark", "code"),
    [
        ("25", 0.12, r"order_created  ?-*\|=+ handled", r"the connection is closed", 0),
        (
            *("0.1", 1000, r"order_created  ?-*\|=+ CancelledError"),
            *(r"message_abandoned: message_id \w+", 75),
        ),
    ],
    ids=["graceful", "deadline"],
)
def test_the_demo_draws_its_shutdown(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    drain_seconds: str,
    handler_seconds: float,
    bar: str,
    mark: str,
    code: int,
) -> None:
    async def handle(_body: bytes) -> None:
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(handler_seconds)

    monkeypatch.setenv("CONSUMER_DRAIN_SECONDS", drain_seconds)
    examples = {"order_created": b"{}"}
    exit_code, out, _ = call(
        "demo", "--timeline", handlers={"order_created": handle}, examples=examples
    )
    assert exit_code == code
    assert "step_done" not in out  # logged for the drawing only
    _, _, drawn = out.partition("the shutdown, in seconds after the signal\n")
    assert re.search(bar, drawn), drawn
    for least_seconds, event in (
        (0, "stop_requested: reason SIGTERM"),
        (0.1, mark),
        (0.1, r"drained: handled \d"),
    ):
        found = re.search(rf"(\d+\.\d\d)  {event}", drawn)
        assert found, drawn
        assert float(found[1]) >= least_seconds, drawn


def test_a_demo_whose_lifespan_fails_ends_with_its_error(call: Call) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        msg = "the database is down"
        raise RuntimeError(msg)
        yield

    with pytest.raises(RuntimeError, match="the database is down"):
        call("demo", examples={"order_created": b'{"id": "1"}'}, lifespan=lifespan)


def test_a_demo_without_examples_says_what_is_missing(call: Call) -> None:
    exit_code, _, err = call("demo")
    assert exit_code == 2
    assert "EXAMPLES in handlers/__init__.py is empty" in err


@pytest.mark.slow
@on_one_broker
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_publish_that_waits_for_its_input(
    broker: Server, queue: str, tmp_path: Path, signum: signal.Signals
) -> None:
    environment = service_environment(broker.url, queue, Ledger(tmp_path / "ledger"))
    with subprocess.Popen(
        service_command("publish", "-"),
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b'{"id": "1"}\n')
        process.stdin.flush()
        give_up_at = time.monotonic() + 20
        while broker.counts(queue).ready != 1:
            assert time.monotonic() < give_up_at
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum
        told = process.stderr.read().decode()
    # The broker can have a message before its confirmation arrives here, and the signal in between.
    assert told in (f"published {count} to {queue}\n" for count in ("1 message", "0 messages"))


@pytest.mark.slow
@on_one_broker
def test_a_command_under_nohup_outlives_its_terminal(
    broker: Server, queue: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        ["nohup", *service_command("publish", "-")],
        env=service_environment(broker.url, queue, Ledger(tmp_path / "ledger")),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        wait_until(lambda: broker.counts(queue).ready == 1)
        process.send_signal(signal.SIGHUP)
        process.stdin.write(b"{}\n")
        process.stdin.close()
        assert process.wait(20) == 0
    assert broker.counts(queue).ready == 2


@pytest.mark.slow
@on_one_broker
def test_an_interrupted_publish_says_how_many_were_confirmed(
    broker: Server, queue: str, tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    lines.write_bytes(b"{}\n" * 300_000)
    environment = service_environment(broker.url, queue, Ledger(tmp_path / "ledger"))
    with (
        lines.open("rb") as stdin,
        subprocess.Popen(
            service_command("publish", "-"),
            env=environment,
            cwd=tmp_path,
            stdin=stdin,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        assert process.stderr is not None
        wait_until(lambda: broker.counts(queue).ready > 1000)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
        told = process.stderr.read().decode()
    [count] = re.findall(r"published ([\d,]+) messages", told)
    # The step in progress may be in the queue, while its confirmation has not arrived yet.
    assert 0 <= broker.counts(queue).ready - int(count.replace(",", "")) <= AT_ONCE


def test_new_handler_runs_the_tool_of_the_checkout(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    exit_code, _, errors = call("new-handler", "refund_asked")
    assert exit_code == 2
    assert "new-handler needs tools/new_handler.py" in errors
    tool = tmp_path / "tools/new_handler.py"
    tool.parent.mkdir()
    tool.write_text("import sys; sys.exit(7 if sys.argv[1:] == ['refund_asked'] else 1)")
    assert call("new-handler", "refund_asked")[0] == 7
