"""Some of many dead letters, on every broker: those that a filter selects are taken, the others stay unchanged."""

import asyncio
import base64
import json
import math
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.contract import Connect, eventually, need, take
from harness.process import Ledger, ServiceProcess, service_command, service_environment
from harness.servers import Server
from runtime.brokers import dead_letters, make_source
from runtime.brokers.dead_letters import Selection
from runtime.brokers.source import Broker
from runtime.errors import BrokerRefused
from runtime.handlers import Handles
from runtime.message import DeadLetter, Message, OutgoingMessage, Pause, Reject, Retry
from runtime.operate import cli
from runtime.operate.letters import time_of
from runtime.settings import ConsumerSettings
from test_cli import Call, Order, call, command, on_one_broker, settings_of  # noqa: F401

AT_ONCE = 100
MANY, FEWER = 10_000, {"sqs": 1_000}
"""moto searches its whole queue for each letter: ten times as many letters take a hundred times as long."""
WAIT_SECONDS = 120


async def make_dead(connect: Connect, count: int, reason: Callable[[int], str]) -> None:
    """Dead letters whose bodies and ids are their numbers, in this order."""
    async with connect(prefetch=AT_ONCE) as source:
        need(source, "dead_letters")
        for start in range(0, count, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, count))
            await source.publish(
                [OutgoingMessage(b"%d" % n, f"kind.{n % 7}", f"id-{n}") for n in numbers]
            )
            for message in await take(source, len(numbers)):
                await source.reject(message, reason(int(message.body)))
        await source.stop()
    async with connect(prefetch=0) as source:
        give_up_at = time.monotonic() + WAIT_SECONDS
        while (dead := await source.count_dead_letters()) != count:
            assert time.monotonic() < give_up_at, f"{dead} of {count}"
            await asyncio.sleep(0.05)


async def numbers_of(source: Broker, **filters: Any) -> list[int]:
    selection = Selection(**filters)
    found = [int(letter.body) async for letter in source.dead_letters(selection=selection)]
    return found if keeps_order(source) else sorted(found)


def keeps_order(source: Broker) -> bool:
    """Whether dead letters keep their order: Kafka's are in one partition."""
    return source.capabilities.order or type(source).__name__ == "KafkaBroker"


async def last(steps: AsyncIterator[int]) -> int:
    return ([0] + [done async for done in steps])[-1]


@pytest.mark.very_slow
async def test_of_ten_thousand_dead_letters_1_or_100_are_replayed_and_the_others_keep_their_order(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    """Meanwhile a consumer takes the replayed letters, and rejects them again; another command lists."""
    broker = request.node.callspec.params["broker"]
    count = int(os.environ.get("DEAD_LETTERS", FEWER.get(broker, MANY)))
    one, rare = count // 2, count // 100

    def reason(number: int) -> str:
        return "the one" if number == one else f"rare {number % rare == 3}"

    await make_dead(connect, count, reason)
    began = time.monotonic()
    async with connect(prefetch=0) as source:
        before = await numbers_of(source)
        assert sorted(before) == list(range(count))
        await eventually(count, source.count_dead_letters)
        listed = time.monotonic() - began
        assert await last(source.replay_dead_letters(Selection(reason="the one"))) == 1
        await eventually(count - 1, source.count_dead_letters)
        filtered = time.monotonic() - began - listed
        async with connect(prefetch=AT_ONCE) as consumer, connect(prefetch=0) as other:
            (message,) = await take(consumer, 1)
            assert int(message.body) == one
            await consumer.ack(message)

            async def handle() -> None:
                # The first number arrives when all letters have been read, even after a long time.
                for _ in range(100):
                    await consumer.reject(await anext(consumer), "again")

            async def look() -> None:
                if type(source).__name__ != "RabbitBroker":  # it would keep some of them unacked
                    [letter async for letter in other.dead_letters(50)]

            began = time.monotonic()
            replaying = last(source.replay_dead_letters(Selection(reason="rare True")))
            replayed, _, _ = await asyncio.gather(replaying, handle(), look())
            assert replayed == 100
            hundred = time.monotonic() - began
            await consumer.stop()
        again = [number for number in before if number % rare == 3 and number != one]
        rest = [number for number in before if number not in {*again, one}]

        async def others() -> list[int]:
            return [number for number in await numbers_of(source) if number not in again]

        await eventually(rest, others)
        await eventually(count - 1, source.count_dead_letters)
        assert sorted(await numbers_of(source, reason="again")) == sorted(again)
        await eventually(count - 1, source.count_dead_letters)
        assert await last(source.purge_dead_letters(Selection(reason="again"))) == 100
        await eventually(count - 101, source.count_dead_letters)
        began = time.monotonic()
        assert await last(source.purge_dead_letters(Selection(before=math.inf, after=1.0))) == (
            count - 101
        )
        print(
            f"{count} letters: listed in {listed:.1f} s, one moved in {filtered:.1f} s,",
            f"100 moved and rejected again in {hundred:.1f} s,",
            f"all deleted in {time.monotonic() - began:.1f} s",
        )
        await eventually(0, source.count_dead_letters)


async def test_a_filter_takes_its_letters_and_the_others_keep_their_order_and_their_properties(
    connect: Connect,
) -> None:
    await make_dead(connect, 60, lambda n: "bad" if n % 3 else "good")
    async with connect(prefetch=0) as source:
        everything = await numbers_of(source)
        await eventually(60, source.count_dead_letters)
        kept = [number for number in everything if not (number % 3 == 0 and number % 7 == 0)]
        chosen = Selection(type="kind.0", reason="good")
        assert await last(source.replay_dead_letters(chosen)) == 3
        await eventually(57, source.count_dead_letters)
        assert await numbers_of(source) == kept
        await eventually(57, source.count_dead_letters)  # the letters are visible again
        assert await last(source.purge_dead_letters(Selection(reason="bad", limit=5))) == 5
        await eventually(52, source.count_dead_letters)
        left = await numbers_of(source)
        await eventually(52, source.count_dead_letters)
        assert len(left) == 52
        assert left == [number for number in kept if number in left]
        for letter in [one async for one in source.dead_letters(3)]:
            number = int(letter.body)
            assert (letter.id, letter.type) == (f"id-{number}", f"kind.{number % 7}")
            assert letter.attempt == 1
    async with connect(prefetch=10) as source:
        assert sorted(int(message.body) for message in await take(source, 3)) == [0, 21, 42]
        await source.stop()


async def test_two_commands_at_once_lose_none_and_delete_only_what_they_select(
    connect: Connect,
) -> None:
    """Both may replay a letter that they read at the same moment; on most brokers this does not happen."""
    await make_dead(connect, 300, lambda n: f"{n % 2} bad")
    async with connect(prefetch=0) as one, connect(prefetch=0) as other:
        await asyncio.gather(
            last(one.purge_dead_letters(Selection(reason="0 bad", limit=100))),
            last(other.purge_dead_letters(Selection(reason="0 bad"))),
        )
        give_up_at = time.monotonic() + WAIT_SECONDS
        while await numbers_of(one, reason="0 bad"):  # letters that the other command had hidden
            assert time.monotonic() < give_up_at
            await last(one.purge_dead_letters(Selection(reason="0 bad")))
        await eventually(150, one.count_dead_letters)
        assert sorted(await numbers_of(one)) == list(range(1, 300, 2))


class Clock:
    """Replaces the modules time and asyncio: time passes only during a sleep."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)


async def test_a_rate_bounds_how_many_are_moved_a_second(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_dead(connect, 12, lambda n: "bad")
    clock = Clock()
    monkeypatch.setattr(dead_letters, "time", clock)
    monkeypatch.setattr(dead_letters, "asyncio", clock)
    async with connect(prefetch=0) as source:
        moved_at = [
            (clock.now, moved)
            async for moved in source.replay_dead_letters(Selection(rate=10, limit=11))
        ]
        assert moved_at == [(0, 10), (1, 11)]
        assert clock.now == pytest.approx(1.1)
        await eventually(1, source.count_dead_letters)


async def test_a_letter_read_is_the_message_that_a_handler_would_get_again(
    connect: Connect,
) -> None:
    sent = OutgoingMessage(
        b"\xff", "kind", "id-1", {"trace": "t"}, key="k", content_type="image/png"
    )
    async with connect(prefetch=1) as source:
        need(source, "dead_letters")
        await source.publish([sent])
        (first,) = await take(source, 1)
        await source.reject(first, "bad")
        await eventually(1, source.count_dead_letters)
        [letter] = [one async for one in source.dead_letters()]
        await last(source.replay_dead_letters(Selection(ids={"id-1"})))
        (again,) = await take(source, 1)
        fields = ("body", "id", "type", "key", "content_type", "attempt")
        assert [getattr(letter, name) for name in fields] == [getattr(again, n) for n in fields]
        own = {name for name in letter.headers if name.startswith("x-consumer")}
        assert own <= {name for name in again.headers if name.startswith("x-consumer")}
        assert letter.headers["trace"] == "t"
        await source.ack(again)


# -- the filters


@given(
    letter_type=st.sampled_from(["order", "order.paid", "order[1]", "", "o"]),
    at=st.floats(0, 2e9),
    before=st.floats(0, 2e9),
    after=st.floats(0, 2e9),
)
def test_a_letter_is_selected_if_every_filter_fits(
    letter_type: str, at: float, before: float, after: float
) -> None:
    letter = DeadLetter(b"", "id", letter_type, reason="no such customer", dead_lettered_at=at)
    assert Selection().matches(letter)
    assert Selection(before=before).matches(letter) == (at < before)
    assert Selection(after=after).matches(letter) == (at >= after)
    assert Selection(type=letter_type).matches(letter)
    assert Selection(type="order*").matches(letter) == letter_type.startswith("order")
    assert Selection(reason="such").matches(letter)
    assert not Selection(reason="such", ids=("other",)).matches(letter)
    assert not Selection(type="?" * len(letter_type) or "?").matches(letter)


@given(st.integers(0, 2**40), st.sets(st.integers(1, 5_000), max_size=300))
def test_offsets_that_were_taken_survive_as_metadata_of_kafka(first: int, above: set[int]) -> None:
    kafka: Any = pytest.importorskip("runtime.brokers.kafka")
    offsets = {first + number for number in above}
    metadata = kafka._metadata_of(first, offsets)
    assert kafka._offsets_of(kafka.OffsetAndMetadata(first, metadata)) == offsets


@given(
    st.integers(0, 2**40),
    st.integers(0, 3_000),
    st.sets(st.integers(0, 2_999), max_size=100),
    st.sampled_from([0, 40, 100, 4096]),
)
def test_a_commit_of_kafka_marks_what_is_settled_and_nothing_else(
    begin: int, count: int, places: set[int], most_bytes: int
) -> None:
    kafka: Any = pytest.importorskip("runtime.brokers.kafka")
    end = begin + count
    unsettled = {begin + place for place in places if place < count}
    one = kafka._Partition(("orders", 0), unacked=unsettled, position=end).commit(most_bytes)
    assert one.offset == min(unsettled, default=end)
    assert len(one.metadata) <= most_bytes
    marked, left = kafka._marks_of(one)
    settled = {offset for offset in marked if offset not in left}
    if most_bytes == 4096:
        assert settled == {*range(one.offset, end)} - unsettled
    assert settled <= {*range(one.offset, end)} - unsettled
    # The next owner, before it has read anything.
    assert (
        kafka._Partition(("orders", 0), marked, left).commit(most_bytes) == one or not one.metadata
    )


@pytest.mark.parametrize("metadata", ["", "other program's", "eJw=", "€", "x-consumer-settled:e"])
def test_metadata_of_another_program_means_nothing_was_taken(metadata: str) -> None:
    kafka: Any = pytest.importorskip("runtime.brokers.kafka")
    assert kafka._offsets_of(kafka.OffsetAndMetadata(7, metadata)) == set()


def test_more_offsets_than_a_commit_can_hold_are_refused_before_any_is_moved() -> None:
    kafka: Any = pytest.importorskip("runtime.brokers.kafka")
    seeded = random.Random(1)
    with pytest.raises(BrokerRefused, match="first replay or purge the oldest ones"):
        kafka._metadata_of(0, {n for n in range(1, 60_000) if seeded.random() < 0.5})


# -- the commands


async def letters_of(settings: Any, *letters: tuple[str, str, bytes]) -> None:
    """Dead letters with this id, reason and body, in the embedded broker's file."""
    async with make_source(settings, prefetch=10) as source:
        await source.declare()
        await source.start()
        for id, reason, body in letters:
            await source.publish([OutgoingMessage(body, "order_created", id, {"tenant": "t1"})])
            await source.reject(await anext(source), reason)
        await source.stop()


@pytest.fixture
def some_dead(
    command: Call,  # noqa: F811
    broker: Server,
    queue: str,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    asyncio.run(
        letters_of(
            settings_of(broker, queue),
            ("id-1", "no such customer", b'{"id": "1"}'),
            ("id-2", "failed 5 times", b"\xff"),
            ("id-3", "no such customer", b'{"id": 3}'),
        )
    )
    capsys.readouterr()
    return command


@on_one_broker
def test_bodies_are_shown_only_when_asked_for(some_dead: Call) -> None:
    code, out, err = some_dead("dead-letters", "list", "--reason", "customer", "--limit", "1")
    assert (code, err) == (0, "1 of 3 dead letters\n")
    assert json.loads(out).keys() == {"id", "type", "dead_lettered_at", "attempts", "reason"}
    _, out, _ = some_dead("dead-letters", "list", "--body")
    first, second, _ = map(json.loads, out.splitlines())
    assert first["body"] == '{"id": "1"}'
    assert base64.b64decode(second["body_base64"]) == b"\xff"


@on_one_broker
def test_one_letter_is_shown_with_its_headers_and_its_body(some_dead: Call) -> None:
    code, out, _ = some_dead("dead-letters", "show", "id-1")
    shown = json.loads(out)
    assert (code, shown["headers"], shown["body"]) == (0, {"tenant": "t1"}, '{"id": "1"}')
    assert some_dead("dead-letters", "show", "id-9") == (
        1,
        "",
        "orders: no dead letter has this id\n",
    )


@on_one_broker
def test_the_filters_of_a_command_select_what_it_changes(
    some_dead: Call, broker: Server, queue: str
) -> None:
    assert some_dead("dead-letters", "purge", "--yes", "--before", "1h")[2].startswith("deleted 0")
    assert some_dead("dead-letters", "replay", "--yes", "--id", "id-3")[2].startswith("replayed 1")
    deleted = some_dead("dead-letters", "purge", "--yes", "--after", "1h", "--type", "order_*")
    assert deleted[2].startswith("deleted 2")
    assert (broker.counts(queue).ready, broker.counts(queue).dead) == (1, 0)


@on_one_broker
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--before", "yesterday"], "'yesterday' is not a time: write 2026-11-30T08:15"),
        (["--before", "9" * 400 + "d"], "'9999"),
        (["--after", "9" * 5_000 + "d"], " is not a time: write 2026-11-30T08:15"),
        (["--limit", "9" * 5_000], " is not a whole number above 0 of at most 12 digits"),
        (["--limit", "0"], "'0' is not a whole number above 0"),
        (["--rate", "-1"], "'-1' is not a whole number above 0"),
    ],
)
def test_a_wrong_filter_is_a_usage_error(
    some_dead: Call, arguments: list[str], sentence: str
) -> None:
    code, _, err = some_dead("dead-letters", "purge", *arguments)
    assert code == 2
    assert sentence in err
    assert len(err.splitlines()[-1]) < 200


def test_a_time_is_utc_unless_it_says_another_zone_or_how_long_ago() -> None:
    assert time_of("2026-11-30T08:15") == datetime(2026, 11, 30, 8, 15, tzinfo=UTC).timestamp()
    assert time_of("2026-11-30T08:15+01:00") == time_of("2026-11-30T07:15")
    assert time_of("2h") == pytest.approx(time.time() - 7200, abs=5)


@on_one_broker
def test_handlers_are_tried_on_copies_and_nothing_is_settled_or_published(
    some_dead: Call, broker: Server, queue: str
) -> None:
    seen = []

    async def handle(event: Order, message: Message) -> OutgoingMessage:
        seen.append(event.id)
        await message.publish(OutgoingMessage(b"", "at_once", to=f"source:{queue}"))
        return OutgoingMessage(b"", "result", to=f"source:{queue}")

    code, out, err = some_dead("dead-letters", "try", handlers={"order_created": handle})
    one, two, three = map(json.loads, out.splitlines())
    assert (code, seen) == (1, ["1"])
    assert (one["outcome"], one["handler"]) == ("handled", "order_created")
    assert [sent["type"] for sent in one["published"]] == ["at_once", "result"]
    assert two["outcome"] == three["outcome"] == "rejected"
    assert three["reason"].startswith("invalid payload: id: ")
    assert "nothing was settled or published" in err
    assert (broker.counts(queue).ready, broker.counts(queue).dead) == (0, 3)


@on_one_broker
@pytest.mark.parametrize("failure", [ValueError("7"), Reject("no"), KeyError("no"), SystemExit(3)])
def test_a_handler_that_fails_on_a_copy_says_what_the_service_would_do(
    some_dead: Call, failure: BaseException
) -> None:
    def handle(event: Order) -> None:
        raise failure

    arguments = ("dead-letters", "try", "--id", "id-1")
    handles = Handles(handle, reject_on=(KeyError,))
    code, out, _ = some_dead(*arguments, handlers={"order_created": handles})
    outcome = json.loads(out)
    expected = "rejected" if isinstance(failure, Reject | KeyError) else "retried"
    assert (code, outcome["outcome"]) == (1, expected)
    assert str(failure) in outcome["reason"]


@on_one_broker
@pytest.mark.parametrize(
    "own",
    [{"reject_on": (ValueError,)}, {"max_attempts": 1}],
    ids=["reject_on", "the only attempt"],
)
@pytest.mark.parametrize("failure", [ValueError("7"), Pause(1.0), Retry()])
def test_a_handler_with_limits_of_its_own_says_what_the_service_would_do(
    some_dead: Call, own: dict[str, Any], failure: Exception
) -> None:
    def handle(event: Order) -> None:
        raise failure

    arguments = ("dead-letters", "try", "--id", "id-1")
    _, out, _ = some_dead(*arguments, handlers={"order_created": Handles(handle, **own)})
    counted = "max_attempts" in own and not isinstance(failure, Pause)
    expected = "rejected" if counted or isinstance(failure, ValueError) else "retried"
    assert json.loads(out)["outcome"] == expected


@on_one_broker
@pytest.mark.parametrize(
    ("kind", "wait"), [("def", "time.sleep(60)"), ("async def", "await asyncio.sleep(60)")]
)
def test_an_interrupted_try_waits_for_no_handler_and_begins_no_other(
    broker: Server, queue: str, tmp_path: Path, kind: str, wait: str
) -> None:
    letters = [("id-1", "bad", b"{}"), ("id-2", "bad", b"{}")]
    asyncio.run(letters_of(settings_of(broker, queue), *letters))
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, sys, time\nfrom runtime.operate.cli import Service, main\n\n"
        f'{kind} handle(body: bytes) -> None:\n    print(\'{{"event": "began"}}\', flush=True)\n'
        f"    {wait}\n\nsys.exit(main(Service(name='orders', handlers={{'x': handle}})))\n"
    )
    environment = service_environment(broker.url, queue, Ledger(tmp_path / "ledger"))
    trying = service_command("dead-letters", "try", service=program)
    with closing(ServiceProcess(trying, environment)) as process:
        process.wait_for("began")
        code, seconds = process.stop(signal.SIGINT)
        assert code == 130
        assert seconds < 20
        assert process.events == [{"event": "began"}]
        assert "Traceback" not in process.stderr


@on_one_broker
def test_a_letter_is_found_by_its_id_as_it_is_and_as_it_is_shown(
    command: Call,  # noqa: F811
    broker: Server,
    queue: str,
) -> None:
    id = "order?token=abc"
    asyncio.run(letters_of(settings_of(broker, queue), (id, "bad", b"{}"), ("id-2", "bad", b"")))
    shown = json.loads(command("dead-letters", "list")[1].splitlines()[0])["id"]
    assert shown == "order?token=***"
    for one in (id, shown):
        assert json.loads(command("dead-letters", "show", one)[1])["id"] == shown
    assert json.loads(command("dead-letters", "try", "--id", shown)[1])["id"] == shown
    assert command("dead-letters", "purge", "--yes", "--id", shown)[2].startswith("deleted 1 ")


@on_one_broker
@pytest.mark.parametrize("action", ["list", "show id-1", "purge", "try"])
def test_the_reading_of_a_command_that_fails_ends_before_its_connection(
    some_dead: Call, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """Until the reading ends, some brokers hide the letters that were read."""
    events = []

    class Watched(type(make_source(ConsumerSettings(broker_url="sqlite:///x.db")))):  # type: ignore[misc]
        @asynccontextmanager
        async def _reading(self) -> AsyncIterator[Any]:
            try:
                yield None
            finally:
                events.append("read")

        async def __aexit__(self, *exc_info: object) -> None:
            await super().__aexit__(*exc_info)
            events.append("closed")

    def fail(*_: Any, **__: Any) -> None:
        raise BrokerRefused("enough")

    monkeypatch.setattr(cli, "make_source", Watched)
    for name in ("cli.shown", "console.Progress.advance", "letters._Recorder.handle"):
        monkeypatch.setattr(f"runtime.operate.{name}", fail)
    monkeypatch.setattr("runtime.operate.console.Progress.__exit__", lambda *_: None)
    extra = ["--yes", "--id", "id-1"] if action == "purge" else []
    code, _, err = some_dead("dead-letters", *action.split(), *extra)
    assert (code, err) == (2, "orders: enough\n")
    assert events == ["read", "closed"]


@on_one_broker
@pytest.mark.parametrize(
    ("body", "headers", "sentence"),
    [(b"", {"a": object()}, "PydanticSerializationError"), (b"12345", {}, "a body of 5 bytes")],
    ids=["headers", "body"],
)
def test_a_result_that_no_broker_takes_is_a_failure(
    some_dead: Call,
    monkeypatch: pytest.MonkeyPatch,
    body: bytes,
    headers: dict[str, Any],
    sentence: str,
) -> None:
    def handle(event: Order) -> OutgoingMessage:
        return OutgoingMessage(body, "result", to="source:q", headers=headers)

    monkeypatch.setattr("runtime.brokers.sqlite.SqliteBroker.largest_body_bytes", 4)
    _, out, _ = some_dead("dead-letters", "try", "--id", "id-1", handlers={"x": handle})
    assert json.loads(out)["outcome"] == "retried"
    assert sentence in json.loads(out)["reason"]
