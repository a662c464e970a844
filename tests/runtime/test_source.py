"""The buffer between the fetcher and the workers: each message reaches exactly one of them. And `Connectivity`."""

import asyncio
from collections.abc import MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from harness.contract import eventually
from runtime import logs
from runtime.brokers import connectivity, put_off, source
from runtime.brokers.buffer import Buffer
from runtime.brokers.connectivity import Connectivity
from runtime.brokers.delivery import make_message
from runtime.brokers.put_off import backoff_seconds
from runtime.brokers.source import Source
from runtime.errors import (
    BrokerDenied,
    BrokerError,
    BrokerRefused,
    BrokerUnavailable,
    MendableRefusal,
    SourceFailed,
)
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import length_of


def message(number: int = 0) -> Message:
    return Message(b"", id=str(number))


async def waiting(buffer: Buffer, count: int) -> list[asyncio.Task[Message]]:
    """This many workers, all asleep in `get`, in the order of the list."""
    workers = [asyncio.create_task(buffer.get()) for _ in range(count)]
    await asyncio.sleep(0)
    return workers


async def let_all_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def end(workers: list[asyncio.Task[Message]]) -> list[Message | BaseException]:
    for worker in workers:
        worker.cancel()
    return await asyncio.gather(*workers, return_exceptions=True)


async def test_messages_come_in_the_order_they_were_put() -> None:
    buffer = Buffer()
    for number in range(3):
        buffer.put(message(number))
    assert len(buffer) == 3
    assert [(await buffer.get()).id for _ in range(3)] == ["0", "1", "2"]


async def test_one_put_wakes_one_waiting_worker() -> None:
    buffer = Buffer()
    workers = await waiting(buffer, 3)
    buffer.put(message())
    assert len(buffer._waiters) == 2  # these were not even woken
    await let_all_run()
    assert [worker.done() for worker in workers] == [True, False, False]
    await end(workers)


async def test_many_puts_at_once_wake_as_many_workers() -> None:
    buffer = Buffer()
    workers = await waiting(buffer, 3)
    for number in range(2):
        buffer.put(message(number))
    await let_all_run()
    assert [worker.done() for worker in workers] == [True, True, False]
    await end(workers)


async def test_a_worker_that_takes_all_by_itself_wakes_two_others_at_most() -> None:
    waits = 0

    class Counting(Buffer):
        async def _wait(self) -> None:
            nonlocal waits
            waits += 1
            await super()._wait()

    async def work() -> None:
        while True:
            await buffer.get()

    buffer = Counting()
    workers = [asyncio.create_task(work()) for _ in range(100)]
    await let_all_run()
    for number in range(100):
        buffer.put(message(number))
    await let_all_run()
    assert len(buffer) == 0
    assert waits <= 100 + 3
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)


async def test_a_worker_cancelled_after_its_call_passes_the_call_on() -> None:
    buffer = Buffer()
    first, second = await waiting(buffer, 2)
    buffer.put(message())
    first.cancel()  # it was woken, and has not run yet
    await let_all_run()
    assert first.cancelled()
    assert second.done()
    assert len(buffer) == 0


async def test_a_put_at_the_instant_of_a_cancellation_goes_to_the_next_worker() -> None:
    buffer = Buffer()
    first, second = await waiting(buffer, 2)
    first.cancel()  # it does not know it yet
    buffer.put(message())
    await let_all_run()
    assert first.cancelled()
    assert second.done()


async def test_a_put_at_the_instant_of_the_only_workers_cancellation_stays_in_the_buffer() -> None:
    buffer = Buffer()
    (worker,) = await waiting(buffer, 1)
    worker.cancel()
    buffer.put(message(7))
    await let_all_run()
    assert worker.cancelled()
    assert (await buffer.get()).id == "7"


async def test_a_worker_that_was_overtaken_waits_again() -> None:
    buffer = Buffer()
    (slow,) = await waiting(buffer, 1)
    buffer.put(message(0))
    assert (await buffer.get()).id == "0"  # before the woken worker runs
    await let_all_run()
    assert not slow.done()
    buffer.put(message(1))
    assert (await slow).id == "1"


async def test_cancelled_workers_leave_nothing_in_the_buffer() -> None:
    buffer = Buffer()
    for _ in range(100):
        await end(await waiting(buffer, 1))
    assert not buffer._waiters


STEPS = ["put", "get", "cancel", "abandon", "turn"]


@given(steps=st.lists(st.sampled_from(STEPS), max_size=40))
def test_no_message_waits_while_a_worker_waits(steps: list[str]) -> None:
    """In any order of puts, workers that start and end, and turns of the loop; no message is lost."""

    async def interleave() -> None:
        buffer = Buffer()
        workers: list[asyncio.Task[Message]] = []
        put = 0
        for step in steps:
            match step:
                case "put":
                    buffer.put(message(put))
                    put += 1
                case "get":
                    workers.append(asyncio.create_task(buffer.get()))
                case "cancel" if workers:
                    workers[len(workers) // 2].cancel()
                case "abandon" if not buffer.takeable:  # a coroutine is closed when it is woken
                    abandoned = buffer.get()
                    abandoned.send(None)
                    buffer.put(message())
                    put += 1
                    abandoned.close()
                case "turn":
                    await asyncio.sleep(0)
        for _ in range(2 * len(steps)):
            await asyncio.sleep(0)
        asleep = [worker for worker in workers if not worker.done()]
        assert not (len(buffer) and asleep)
        taken = [w for w in workers if w.done() and not w.cancelled()]
        assert len(taken) + len(buffer) == put
        await end(asleep)

    asyncio.run(interleave())


async def test_a_closed_buffer_is_emptied_and_then_ends_every_worker() -> None:
    buffer = Buffer()
    workers = await waiting(buffer, 3)
    buffer.put(message())
    buffer.close()
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert [type(result) for result in results] == [Message, StopAsyncIteration, StopAsyncIteration]
    with pytest.raises(StopAsyncIteration):
        await buffer.get()


async def test_a_failure_reaches_every_worker_even_past_waiting_messages() -> None:
    buffer = Buffer()
    workers = await waiting(buffer, 4)
    buffer.put(message())
    buffer.fail(OSError("the disk is gone"))
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert [type(result) for result in results] == [SourceFailed] * 4
    with pytest.raises(SourceFailed, match="the disk is gone"):
        await buffer.get()


async def test_taking_all_empties_the_buffer_and_wakes_no_worker() -> None:
    buffer = Buffer()
    for number in range(3):
        buffer.put(message(number))
    assert [message.id for message in buffer.take_all()] == ["0", "1", "2"]
    workers = await waiting(buffer, 1)
    assert not workers[0].done()
    await end(workers)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The levels and names of the log events."""
    events: list[str] = []

    def keep(_logger: object, level: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
        events.append(f"{level} {event['event']}")
        raise structlog.DropEvent

    for module in (connectivity, source):
        monkeypatch.setattr(module, "log", structlog.wrap_logger(None, processors=[keep]))
    return events


def test_the_back_off_doubles_to_its_longest_and_no_two_wait_alike() -> None:
    for attempt, longest in ((1, 1), (2, 2), (3, 4), (4, 5), (1000, 5)):
        pauses = [backoff_seconds(attempt, first=1, longest=5) for _ in range(20)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 1


async def test_an_outage_of_several_attempts_in_a_minute_is_logged_once(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connectivity, "FIRST_PAUSE_SECONDS", 0.001)
    link, until, outcomes = (
        Connectivity("here"),
        asyncio.Event(),
        iter([True, False, False, False, True]),
    )

    async def work() -> None:
        if (outcome := next(outcomes, None)) is None:
            until.set()
        elif outcome:
            link.established()
        else:
            raise BrokerUnavailable("away")

    await link.keep(work, until)
    failed = ["debug reconnect_failed"] * 2
    assert events == ["info connected", "warning reconnecting", *failed, "info connected"]


async def test_the_pause_before_the_next_attempt_ends_with_the_event(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connectivity, "FIRST_PAUSE_SECONDS", 3600.0)
    monkeypatch.setattr(connectivity, "LONGEST_PAUSE_SECONDS", 3600.0)
    link, until = Connectivity("here"), asyncio.Event()

    async def work() -> None:
        asyncio.get_running_loop().call_soon(until.set)
        raise BrokerUnavailable("away")

    async with asyncio.timeout(10):
        await link.keep(work, until)


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
async def test_a_refusal_is_an_outage_that_is_logged_again_at_a_bounded_rate(
    events: list[str], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Also if the connection is established each time, and only its use is refused."""
    monkeypatch.setattr(connectivity, "LONGEST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(logs, "SELDOM_SECONDS", seconds)
    link, until, outcomes = Connectivity("here"), asyncio.Event(), iter([False, True] * 3)

    async def work() -> None:
        if (used := next(outcomes, None)) is None:
            until.set()
        elif used:
            link.established()
        raise MendableRefusal("no certificate") if used is None else BrokerDenied("no right")

    await link.keep(work, until)
    told = events.count("warning reconnecting")
    assert told == (1 if seconds else 7)
    assert events.count("info connected") == (1 if seconds else 3)
    assert len(events) - told - events.count("info connected") == 7 - told
    assert (link.up, link.reason, link.outage_count) == (False, "no certificate", 3)


async def test_an_ordinary_outage_right_after_a_refusal_is_logged(events: list[str]) -> None:
    link = Connectivity("here")
    for reason in (BrokerDenied("no"), "cut", BrokerDenied("no")):
        link.established()
        link.lost(reason)
    assert events.count("warning reconnecting") == 3


def test_a_refusal_in_an_outage_is_logged_at_once_and_then_both_once_a_minute(
    events: list[str],
) -> None:
    link = Connectivity("here")
    link.established()
    for reason in ("cut", "still away", *[BrokerDenied("no"), "restarts"] * 3):
        link.lost(reason)
    assert events[1:4] == ["warning reconnecting", "debug reconnect_failed", "warning reconnecting"]
    assert set(events[4:]) == {"debug reconnect_failed"}


def test_a_line_of_a_long_outage_has_the_newest_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now))
    link = Connectivity("here")
    with structlog.testing.capture_logs() as said:
        link.established()
        for seconds, reason in ((0, "cut"), (59, "refused"), (60, "no route"), (119, "refused")):
            now = 1_000.0 + seconds
            link.lost(reason)
        link.established()
        now += 1
        link.lost("cut again")
    told = [(e["outage_seconds"], e["reason"]) for e in said if e["event"] == "reconnecting"]
    assert told == [(0, "cut"), (60, "no route"), (0, "cut again")]


def test_a_connection_that_the_source_has_closed_is_no_outage(events: list[str]) -> None:
    link = Connectivity("here")
    link.established()
    link.up = False
    link.lost("closed")
    assert events == ["info connected", "debug reconnect_failed"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), BrokerRefused("another kind of queue")])
async def test_any_other_error_of_the_work_passes_through(
    events: list[str], error: Exception
) -> None:
    async def work() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await Connectivity("here").keep(work, asyncio.Event())


# Messages that the broker cannot store.


class Storing(Source):
    """A source whose broker refuses retries and dead letters with `refusal`, if there is one."""

    destinations: ClassVar = {}
    connected = True

    def __init__(self, prefetch: int = 10) -> None:
        super().__init__(
            ConsumerSettings(broker_url=SecretStr("sqlite:///x"), source="x"), prefetch
        )
        self.refusal: BrokerError | None = None
        self.done: list[tuple[str, Message]] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None: ...

    async def declare(self) -> None: ...

    async def describe(self) -> dict[str, int | str]:
        return {}

    async def start(self) -> None: ...

    async def _stop_fetching(self) -> None: ...

    async def _ack(self, message: Message) -> None:
        self.done.append(("ack", message))

    async def _requeue(self, message: Message) -> None:
        self.done.append(("requeue", message))

    async def _retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        await self._move(message, "retry", self._save("retry", message))

    async def _reject(self, message: Message, reason: str) -> None:
        await self._move(message, "reject", self._save("reject", message))

    async def _save(self, settlement: str, message: Message) -> None:
        await self.answers.wait()
        if self.refusal is not None:
            raise self.refusal
        self.done.append((settlement, message))

    async def deliver(self) -> Message:
        self._deliver(message())
        return await anext(self)


@pytest.fixture
def storing(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> Storing:
    monkeypatch.setattr(put_off, "FIRST_SECONDS", 0.001)
    made = Storing()
    made.refusal = BrokerRefused("it is too large")
    return made


async def test_a_retry_that_cannot_be_stored_happens_in_this_process(storing: Storing) -> None:
    one = await storing.deliver()
    for attempt in range(2, 5):
        await storing.retry(one, 0.0, "it failed")
        assert "it is too large" in storing.put_offs.reason
        assert await anext(storing) is one
        assert one.attempt == attempt
    assert storing.done == []  # its delivery is still unacked
    await storing.ack(one)
    assert (storing.done, storing.unacked, storing.put_offs.reason) == ([("ack", one)], set(), "")


async def test_its_delay_is_kept(storing: Storing) -> None:
    one = await storing.deliver()
    began_at = asyncio.get_running_loop().time()
    await storing.retry(one, 0.2, "it failed")
    assert await anext(storing) is one
    assert asyncio.get_running_loop().time() >= began_at + 0.2


async def test_a_dead_letter_that_cannot_be_stored_is_tried_again(
    storing: Storing, events: list[Any]
) -> None:
    """No worker waits for it, its handler does not run again, and the log has each attempt."""
    one = await storing.deliver()
    await storing.reject(one, "it is bad")
    assert not len(storing.buffer)
    await eventually(4, lambda: asyncio.sleep(0, min(4, events.count("warning settlement_lost"))))
    assert (storing.unacked, storing.done) == ({one}, [])
    storing.refusal = None
    await eventually(set(), lambda: asyncio.sleep(0, storing.unacked))
    assert (storing.done, storing.put_offs.reason) == ([("reject", one), ("ack", one)], "")


async def test_pauses_grow_and_no_other_message_waits(
    storing: Storing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put_off, "FIRST_SECONDS", 3600)
    refused = [await storing.deliver() for _ in range(3)]
    for one in refused:
        await storing.reject(one, "it is bad")
    other = await storing.deliver()
    await storing.ack(other)
    assert storing.unacked == set(refused)
    assert storing.put_offs.reason
    await storing.stop()
    assert storing.done == [("ack", other), *(("requeue", one) for one in refused)]
    assert (storing.unacked, storing.put_offs.reason) == (set(), "")


async def test_what_cannot_be_stored_during_shutdown_is_requeued_at_once(storing: Storing) -> None:
    one = await storing.deliver()
    await storing.stop()
    await storing.reject(one, "it is bad")
    assert storing.done == [("requeue", one)]


async def test_a_try_that_is_under_way_at_the_stop_is_ended_and_its_message_requeued(
    storing: Storing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put_off, "END_SECONDS", 0.01)
    one = await storing.deliver()
    await storing.reject(one, "it is bad")
    storing.answers.clear()  # the broker no longer answers
    await eventually(1, length_of(storing.put_offs._storing))
    await storing.stop()
    await let_all_run()
    assert storing.done == [("requeue", one)]
    assert (storing.unacked, storing.put_offs.reason, storing.put_offs._storing) == (set(), "", {})


async def test_a_long_delay_is_kept_by_storing_the_retry_later(
    storing: Storing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put_off, "LONGEST_SECONDS", 0.01)
    one = await storing.deliver()
    await storing.retry(one, 3600, "it failed")
    await eventually(1, length_of(storing.put_offs.timers))
    storing.refusal = None
    await eventually(set(), lambda: asyncio.sleep(0, storing.unacked))
    assert storing.done == [("retry", one), ("ack", one)]
    assert one.attempt == 1


async def test_a_redelivery_of_an_in_flight_message_is_settled_by_its_handler() -> None:
    made = Storing()
    one = await made.deliver()
    one.receipt = "lost"
    made.in_flight = [one]
    again = Message(one.body, one.id, receipt="new")
    assert made._still_in_flight(again) is None  # that delivery is not lost
    made._release(one)
    assert made._still_in_flight(Message(b"other", one.id)) is None
    assert made._still_in_flight(again) is one
    await made.ack(one)
    assert made.done == [("ack", one)]
    assert one.receipt == "new"


async def test_a_fetch_without_a_message_forgets_no_large_one() -> None:
    """Else an idle source would ask for more of them than fit into its memory."""
    made = Storing()
    await made._deliver_fetched([message(), Message(bytes(2**23))])
    for _ in range(20):
        await made._deliver_fetched([])
    assert made._large_bytes == 2**23
    await made._deliver_fetched([message() for _ in range(20)])
    assert made._large_bytes < 2**16


async def test_of_what_was_fetched_redeliveries_of_in_flight_messages_are_not_handled_again() -> (
    None
):
    made = Storing()
    one = await made.deliver()
    made.in_flight = [one]
    made._release(one)
    other = Message(b"other", "other")
    await made._deliver_fetched([Message(one.body, one.id, receipt="new"), other])
    assert (made.buffer.take_all(), made.unacked) == ([other], {one, other})
    assert one.receipt == "new"
    made.ended = True
    await made._deliver_fetched([late := Message(b"late", "late")])
    assert made.done == [("requeue", late)]


async def test_a_redelivery_of_an_in_flight_message_without_an_id_is_found_by_the_rest_of_it() -> (
    None
):
    def delivered(body: bytes, **headers: str) -> Message:
        return make_message(body, id=None, type="", headers=headers)

    made = Storing()
    one = delivered(b"online", topic="devices/1")
    made._deliver(one)
    made._release(one)
    made.in_flight = [one]
    assert made._still_in_flight(delivered(b"online", topic="devices/2")) is None
    assert made._still_in_flight(delivered(b"offline", topic="devices/1")) is None
    assert made._still_in_flight(Message(b"online", "id", headers=one.headers)) is None
    assert made._still_in_flight(delivered(b"online", topic="devices/1")) is one
    assert made._still_in_flight(delivered(b"online", topic="devices/1")) is None  # another one


async def test_a_redelivery_has_the_type_that_consumer_type_from_says() -> None:
    made = Storing()
    made._type_of = lambda message: "by the setting"
    one = await made.deliver()
    assert one.type == "by the setting"
    made.in_flight = [one]
    made._release(one)
    assert made._still_in_flight(Message(one.body, one.id)) is one
