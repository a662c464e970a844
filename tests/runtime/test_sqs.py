"""SQS alone: leases, batches, its limits, foreign messages. Tests of every broker are in test_every_source.py."""

import asyncio
import base64
import gzip
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import pytest
from botocore.exceptions import ClientError
from botocore.session import get_session
from hypothesis import given
from hypothesis import strategies as st

from harness.contract import eventually, take
from harness.servers import Counts, ServerMissing, skip_without_server
from harness.servers.proxy import Proxy
from harness.servers.sqs import KEY, SECRET, SqsServer, moto
from runtime.brokers import sqs
from runtime.brokers.sqs import SqsBroker, parse_url
from runtime.errors import BrokerDenied, BrokerRefused, BrokerUnavailable, SourceFailed
from runtime.message import Message, OutgoingMessage
from steps import (
    Event,
    ack_all,
    buffer_holds,
    eventually_counts,
    eventually_logged,
    find,
    ids,
    publish,
    with_options,
)

AT_ONCE_SECONDS = 5.0

pytestmark = pytest.mark.parametrize("broker", ["sqs"], indirect=True, scope="session")

Connect = Callable[..., AbstractAsyncContextManager[SqsBroker]]


def requests_of(source: SqsBroker) -> Counter[str]:
    """Counts the requests that the source makes from now on, by operation."""
    requests: Counter[str] = Counter()

    def count(model: Any, **_: object) -> None:
        requests[model.name] += 1

    source._client.meta.events.register("before-call.sqs", count)
    return requests


class TestOutages:
    async def test_messages_whose_visibility_timeout_passed_in_an_outage_are_dropped(
        self, connect: Connect, proxy: Proxy, events: list[Event], broker: SqsServer, queue: str
    ) -> None:
        url = with_options(proxy.url, visibility_seconds=1)
        async with connect(broker_url=url) as source, connect() as other:
            await other.stop()
            published = await publish(other, 4)
            (in_flight,) = await take(source, 1)
            await buffer_holds(source, 3)
            proxy.refuse()
            await eventually_counts(broker, queue, Counts(ready=4, delayed=0, dead=0))
            async with connect() as third:
                messages = await take(third, 4)
                assert Counter(ids(messages)) == Counter(published)
                await third.stop()
                proxy.resume()
                await eventually_logged(events, "connected", count=4)
                (new,) = await publish(other, 1)
                (message,) = await take(source, 1)
                assert message.id == new
                await source.retry(in_flight, 1, "too late: it would be there twice")
                await source.ack(message)
                for message in messages:
                    await third.ack(message)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        assert [event["message_id"] for event in find(events, "settlement_lost")] == [in_flight.id]

    async def test_visibility_is_not_extended_after_its_timeout(
        self, connect: Connect, proxy: Proxy, broker: SqsServer, queue: str
    ) -> None:
        """Not even by the repetition of a request that was in time."""
        sent_at: list[float] = []
        url = with_options(proxy.url, visibility_seconds=1)
        async with connect(broker_url=url) as source, connect(prefetch=0) as other:
            await publish(other, 1)
            (message,) = await take(source, 1)
            source._client.meta.events.register(
                "before-send.sqs.ChangeMessageVisibilityBatch",
                lambda **_: sent_at.append(time.monotonic()),
            )
            proxy.refuse()
            await eventually_counts(broker, queue, Counts(ready=1, delayed=0, dead=0))
            await asyncio.sleep(1.1)  # a repetition comes within a second
            assert sent_at
            assert max(sent_at) < message.receipt.invisible_until
            proxy.resume()

    async def test_a_message_that_arrives_as_a_start_is_cancelled_is_requeued_at_once(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        async with connect(prefetch=0) as source:
            await publish(source, 1)
            starting = asyncio.create_task(source.start())
            await asyncio.sleep(0)  # its first poll is in progress
            assert source._polls
            starting.cancel()
        await eventually_counts(broker, queue, Counts(ready=1, delayed=0, dead=0))

    async def test_a_refusal_while_consuming_ends_the_source(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connect(prefetch=1) as source:
            monkeypatch.setattr(sqs, "BATCH_SIZE", 11)  # SQS refuses a request for so many
            source.prefetch = 11
            await publish(source, 1)
            async with asyncio.timeout(20):
                with pytest.raises(SourceFailed, match="MaxNumberOfMessages"):
                    await ack_all(source, 2)
            assert not source.connected


class TestLeases:
    async def test_a_long_handler_and_a_full_buffer_keep_their_messages(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        url = with_options(broker.url, visibility_seconds=1)
        async with connect(prefetch=20, broker_url=url) as source:
            await publish(source, 20)
            await buffer_holds(source, 20)
            (message,) = await take(source, 1)
            requests = requests_of(source)
            held_until = time.monotonic() + 2.5
            while time.monotonic() < held_until:
                counts = await asyncio.to_thread(broker.counts, queue)
                assert counts == Counts(ready=0, delayed=0, dead=0)
            extensions = requests["ChangeMessageVisibilityBatch"]
            assert (
                4 <= extensions <= 2 * (2.5 / (1 / 3) + 1)
            )  # 20 messages, in tens, every third of it
            await source.ack(message)
            await ack_all(source, 19)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_the_messages_of_a_dead_consumer_are_redelivered_after_the_visibility_timeout(
        self, connect: Connect, proxy: Proxy, broker: SqsServer
    ) -> None:
        dying = with_options(proxy.url, visibility_seconds=1)
        async with connect(broker_url=dying) as dead, connect(prefetch=0) as publisher:
            published = await publish(publisher, 3)
            await take(dead, 3)
            proxy.black_hole()
            dead_lettered_at = time.monotonic()
            async with connect() as other:
                messages = await take(other, 3)
                assert time.monotonic() - dead_lettered_at < 1 + AT_ONCE_SECONDS
                assert Counter((m.id, m.attempt) for m in messages) == Counter(
                    (id, 1) for id in published
                )
                for message in messages:
                    await other.ack(message)
            proxy.refuse()

    async def test_a_redelivery_of_an_in_flight_message_is_not_started_again(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        async with connect(prefetch=2) as source:
            await publish(source, 2)
            working, idle = await take(source, 2)
            source.in_flight = [working]
            handles = [message.receipt.handle for message in (working, idle)]
            for message in (working, idle):  # as if its visibility timeout had passed
                message.receipt.invisible_until = 0.0
                source.unacked.discard(message)
                broker.client.change_message_visibility(
                    QueueUrl=broker.queue_url(queue),
                    ReceiptHandle=message.receipt.handle,
                    VisibilityTimeout=0,
                )
            (again,) = await take(source, 1)
            assert again.id == idle.id

            async def is_ours() -> bool:
                return working in source.unacked

            await eventually(True, is_ours)
            assert working.receipt.handle not in handles
            await source.ack(again)
            await source.ack(working)
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))

    async def test_a_message_that_kills_its_consumer_each_time_ends_as_a_dead_letter(
        self, connect: Connect, broker: SqsServer, queue: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqs, "DELIVERY_LIMIT", 3)
        async with connect(prefetch=0) as source:
            (published,) = await publish(source, 1)
            url = broker.queue_url(queue)
            for _ in range(3):  # as often as a consumer received it and ended
                received = broker.client.receive_message(QueueUrl=url, VisibilityTimeout=0)
                assert received["Messages"]
                await asyncio.sleep(0.01)
            await source.start()
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [letter] = [letter async for letter in source.dead_letters(10)]
        assert (letter.id, letter.attempts) == (published, 0)  # no handler failed on it
        assert letter.reason == "moved by the redrive policy of SQS: delivered too often"
        assert abs(letter.dead_lettered_at - time.time()) < 60


class TestBatches:
    async def test_a_worker_that_takes_the_last_message_leaves_no_other_waiting(
        self, connect: Connect
    ) -> None:
        async with connect(prefetch=4) as source:
            await publish(source, 1)
            await buffer_holds(source, 1)  # a poll for three more is not worthwhile now
            (first,) = await take(source, 1)
            await publish(source, 1)
            async with asyncio.timeout(5):
                (second,) = await take(source, 1)
            await source.ack(first)
            await source.ack(second)

    async def test_ten_messages_cost_one_request_of_each_kind(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        async with connect(prefetch=0) as publisher:
            requests = requests_of(publisher)
            await publish(publisher, 100)
            assert requests["SendMessageBatch"] == 10
        async with connect(prefetch=0) as source:
            source.prefetch = 100
            requests = requests_of(source)
            await source.start()
            messages = await take(source, 100)
            await source.stop()
            assert requests["ReceiveMessage"] <= 12  # and one or two that wait for more
            for message in messages[:40]:
                await source.ack(message)
            for message in messages[40:60]:
                await source.retry(message, 0.1, "not now")
            for message in messages[60:]:
                await source.requeue(message)
        del requests["ReceiveMessage"]
        assert requests == {
            "DeleteMessageBatch": 6,
            "SendMessageBatch": 2,
            "ChangeMessageVisibilityBatch": 4,
        }
        await eventually_counts(broker, queue, Counts(ready=60, delayed=0, dead=0))
        assert broker.counts(queue).held == 0

    async def test_settlements_of_the_same_moment_share_a_request(self, connect: Connect) -> None:
        async with connect(prefetch=10) as source:
            await publish(source, 10)
            messages = await take(source, 10)
            await source.stop()
            requests = requests_of(source)
            for message in messages:
                await source.ack(message)
                await asyncio.sleep(0)
            await source._flushed.wait()
            assert requests == {"DeleteMessageBatch": 1}

    async def test_fewer_than_ten_messages_are_not_requested_while_the_buffer_has_some(
        self, connect: Connect
    ) -> None:
        async with connect(prefetch=20, max_body_bytes=1_000) as source:
            await publish(source, 30)
            await buffer_holds(source, 20)
            requests = requests_of(source)
            await ack_all(source, 9)
            await asyncio.sleep(0.1)
            assert "ReceiveMessage" not in requests
            await ack_all(source, 1)
            await buffer_holds(source, 20)
            assert requests["ReceiveMessage"] == 1
            await ack_all(source, 20)

    async def test_an_idle_queue_has_one_poll_at_a_time(
        self, connect: Connect, broker: SqsServer
    ) -> None:
        async with connect(prefetch=100) as source:
            await publish(source, 60)
            await ack_all(source, 60)
            assert source._poll_limit > 1
            await source._flushed.wait()

            async def polls() -> tuple[int, int]:
                return len(source._polls), source._poll_limit

            await eventually((1, 1), polls)
            requests = requests_of(source)
            await asyncio.sleep(1.5)
            assert requests in ({"ReceiveMessage": 1}, {"ReceiveMessage": 2})

    async def test_one_entry_that_fails_does_not_disturb_the_others(
        self, connect: Connect, broker: SqsServer, queue: str, events: list[Event]
    ) -> None:
        async with connect(prefetch=10) as source:
            await publish(source, 10)
            messages = await take(source, 10)
            await source.stop()
            messages[3].receipt.handle = "of another queue"
            messages[7].receipt.handle = "of another queue too"
            for message in messages[:5]:
                await source.ack(message)
            for message in messages[5:]:
                await source.requeue(message)
            await eventually_counts(broker, queue, Counts(ready=4, delayed=0, dead=0))
        lost = {event["message_id"] for event in find(events, "settlement_lost")}
        assert lost == {messages[3].id, messages[7].id}

    async def test_an_entry_that_failed_for_now_is_written_again(
        self, connect: Connect, events: list[Event]
    ) -> None:
        async with connect(prefetch=3) as source:
            await publish(source, 3)
            messages = await take(source, 3)
            await source.stop()
            written: list[int] = []

            def send_without_one(params: dict[str, Any], **_: object) -> dict[str, Any]:
                sent = [entry for entry in params["Entries"] if written or entry["Id"] != "1"]
                return {**params, "Entries": sent}

            def fail_once(parsed: dict[str, Any], **_: object) -> None:
                written.append(len(parsed["Successful"]))
                if len(written) == 1:  # SQS reports this, but moto never does
                    parsed["Failed"] = [{"Id": "1", "SenderFault": False, "Code": "InternalError"}]

            register = source._client.meta.events.register
            register("provide-client-params.sqs.DeleteMessageBatch", send_without_one)
            register("after-call.sqs.DeleteMessageBatch", fail_once)
            for message in messages:
                await source.ack(message)
            await source._flushed.wait()
        assert written == [2, 1]
        assert find(events, "settlement_lost") == []

    async def test_more_bytes_than_a_request_may_have_travel_in_several(
        self, connect: Connect
    ) -> None:
        bodies = [bytes([65 + number]) * 100_000 for number in range(10)]
        async with connect(prefetch=10) as source:
            requests = requests_of(source)
            await source.publish([OutgoingMessage(body) for body in bodies])
            assert requests["SendMessageBatch"] == 5
            messages = await take(source, 10)
            assert sorted(message.body for message in messages) == bodies
            for message in messages:
                await source.ack(message)


class TestStopping:
    async def test_messages_of_the_last_poll_are_requeued_at_once(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        async with connect() as source, connect(prefetch=0) as publisher:
            await asyncio.sleep(0.1)  # its poll is waiting
            stopping = asyncio.create_task(source.stop())
            await publish(publisher, 3)
            await stopping
            assert source.requeued_count == 3
            assert broker.counts(queue) == Counts(ready=3, delayed=0, dead=0)

    async def test_a_stop_that_a_poll_outlasts_does_not_wait_for_it(
        self, connect: Connect, broker: SqsServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqs, "STOP_SECONDS", 0.2)
        url = broker.url.replace("wait_seconds=1", "wait_seconds=20")
        async with connect(broker_url=url) as source:
            await asyncio.sleep(0.1)
            began_at = time.monotonic()
            await source.stop()
        assert time.monotonic() - began_at < 2


def send_raw(broker: SqsServer, queue: str, body: str, **parameters: Any) -> str:
    """Send like another producer; returns the message's id."""
    url = broker.queue_url(queue)
    sent = broker.client.send_message(QueueUrl=url, MessageBody=body, **parameters)
    return str(sent["MessageId"])


def deny_sends(source: SqsBroker, queue: str) -> None:
    """Answer like IAM, which moto does not have: to sends to this queue, or to any."""

    def deny(params: dict[str, Any], **_: object) -> Any:
        if queue in params["body"].decode() or queue in params["url"]:
            answer = SimpleNamespace(status_code=403, headers={}, content=b"", text="")
            error = {
                "Code": "AccessDenied",
                "Message": "not authorized to perform: sqs:SendMessage",
            }
            return answer, {"Error": error, "ResponseMetadata": {"HTTPStatusCode": 403}}
        return None

    source._client.meta.events.register("before-call.sqs.SendMessageBatch", deny, unique_id="deny")


def text(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def reason_of(source: SqsBroker) -> Callable[[], Awaitable[str]]:
    async def look() -> str:
        return source.put_offs.reason

    return look


class TestMessages:
    async def test_a_message_of_another_producer_is_delivered_unmodified(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        attributes = {
            "type": text("order_created"),
            "traceparent": text("00-ab-01"),
            "size": {"DataType": "Number", "StringValue": "12.50"},
            "token": {"DataType": "Binary", "BinaryValue": b"\xff\x00"},
        }
        async with connect(prefetch=1) as source:
            id = send_raw(broker, queue, "größe", MessageAttributes=attributes)
            (message,) = await take(source, 1)
            assert (message.id, message.type, message.attempt) == (id, "order_created", 1)
            assert message.body == "größe".encode()
            assert message.headers == {
                "traceparent": "00-ab-01",
                "size": "12.50",
                "token": b"\xff\x00",
            }
            await source.ack(message)

    @pytest.mark.parametrize("count", [3, 10], ids=["few attributes", "as many as SQS allows"])
    async def test_it_survives_a_retry_a_dead_letter_and_a_replay(
        self, connect: Connect, broker: SqsServer, queue: str, count: int
    ) -> None:
        attributes = {f"a{number}": text(f"value {number}") for number in range(count - 1)}
        attributes["token"] = {"DataType": "Binary.x", "BinaryValue": b"\xff\x00"}  # type: ignore[dict-item]
        async with connect(prefetch=1) as source:
            id = send_raw(
                broker, queue, "body", MessageAttributes=attributes, MessageGroupId="tenant-1"
            )
            (first,) = await take(source, 1)
            await source.retry(first, 0.1, "not now")
            (second,) = await take(source, 1)
            assert (second.id, second.attempt) == (id, 2)
            assert second.headers == first.headers
            await source.reject(second, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            [dead] = broker.client.receive_message(
                QueueUrl=broker.queue_url(f"{queue}-dead"),
                MessageAttributeNames=["All"],
                VisibilityTimeout=0,
            )["Messages"]
            assert len(dead["MessageAttributes"]) <= 10
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (last,) = await take(source, 1)
            assert (last.id, last.attempt, last.body) == (id, 1, b"body")
            assert last.headers == first.headers
            assert last.receipt.attributes == attributes
            assert last.receipt.group == "tenant-1"
            await source.ack(last)

    @pytest.mark.parametrize(
        "envelope",
        [
            "not JSON",
            "[]",
            '{"id": [], "headers": [], "attempts": "many", "due_at": "soon"}',
            '{"id": "", "due_at": 1e999, "dead_lettered_at": 1e999}',
            json.dumps({"due_at": 10**400, "attempts": 10**400}),
            '{"attributes": {"a": 1}}',
            '{"attributes": {"type": {"StringValue": 5}}}',
            '{"attributes": {"a b": {"DataType": "String", "StringValue": "no name for SQS"}}}',
            json.dumps({"attributes": {f"a{n}": {"BinaryValue": "?"} for n in range(10)}}),
            json.dumps({"attributes": 10 * [5]}),
            '{"encoding": "base64", "attempts": -3}',
        ],
    )
    async def test_an_invalid_envelope_is_ignored(
        self, connect: Connect, broker: SqsServer, queue: str, envelope: str
    ) -> None:
        async with connect(prefetch=1) as source:
            id = send_raw(broker, queue, "body?", MessageAttributes={"x-consumer": text(envelope)})
            for _ in range(2):
                (message,) = await take(source, 1)
                assert (message.id, message.type, message.body) == (id, "", b"body?")
                await source.retry(message, 0, "again")
            (message,) = await take(source, 1)
            assert message.attempt == 3
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert (letter.id, letter.reason, letter.attempts) == (id, "bad", 3)

    async def test_fields_of_an_envelope_that_are_no_text_become_text(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        attributes: dict[str, Any] = {f"a{n}": {"StringValue": n} for n in range(10)}
        attributes["type"] = {"StringValue": 5}
        envelope = json.dumps({"id": 7, "headers": {"x": "\ud800"}, "attributes": attributes})
        async with connect(prefetch=1) as source:
            send_raw(broker, queue, "body", MessageAttributes={"x-consumer": text(envelope)})
            for attempt in (1, 2):
                (message,) = await take(source, 1)
                assert (message.id, message.type, message.attempt) == ("7", "5", attempt)
                assert message.headers == {f"a{n}": n for n in range(10)} | {"x": "\ud800"}
                await source.retry(message, 0, "again")
            (message,) = await take(source, 1)
            await source.ack(message)

    @pytest.mark.parametrize(
        ("body", "sent"),
        [
            (
                '{"größe": "\N{GRINNING FACE}"}\r\n\t'.encode(),
                '{"größe": "\N{GRINNING FACE}"}\r\n\t',
            ),
            (b"", "-"),
            (b"\x00", "AA=="),
            (b"\xff", "/w=="),
            ("\uffff".encode(), "77+/"),
        ],
        ids=["text", "empty", "control character", "not UTF-8", "not a character"],
    )
    async def test_text_travels_as_it_is_and_only_other_bodies_are_encoded(
        self, connect: Connect, broker: SqsServer, queue: str, body: bytes, sent: str
    ) -> None:
        async with connect(prefetch=0) as source:
            await source.publish([OutgoingMessage(body)])
            received = broker.client.receive_message(
                QueueUrl=broker.queue_url(queue), VisibilityTimeout=0
            )
            assert received["Messages"][0]["Body"] == sent
            await source.start()
            (message,) = await take(source, 1)
            assert message.body == body
            await source.ack(message)

    async def test_a_delay_longer_than_the_longest_of_sqs_is_kept(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqs, "MAX_DELAY_SECONDS", 1)
        monkeypatch.setattr(sqs, "MAX_VISIBILITY_SECONDS", 1)
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            (message,) = await take(source, 1)
            retried_at = time.monotonic()
            await source.retry(message, 1.5, "not now")
            (message,) = await take(source, 1)
            assert time.monotonic() - retried_at >= 1.5
            assert message.attempt == 2
            await source.ack(message)

    async def test_a_message_that_cannot_be_sent_is_one_sentence(
        self, connect: Connect, events: list[Event]
    ) -> None:
        async with connect(prefetch=0) as source:
            for message, sentence in [
                (OutgoingMessage(b"x" * 1_100_000), "1048576"),
                (OutgoingMessage(b"x", headers={"bytes": b"x"}), "headers are not JSON"),
            ]:
                with pytest.raises(BrokerRefused, match=sentence) as caught:
                    await source.publish([message])
                assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("known", [True, False], ids=["known at start", "later"])
    async def test_a_message_too_large_to_be_sent_again_is_retried_in_this_process(
        self,
        connect: Connect,
        broker: SqsServer,
        queue: str,
        events: list[Event],
        shorten: Callable[..., None],
        known: bool,
    ) -> None:
        shorten(0.01, "FIRST_SECONDS")
        async with connect(prefetch=0) as publisher:
            id = send_raw(broker, queue, "x" * 100_000)  # the largest size so far
            small = await publish(publisher, 9)
        smaller = {
            "QueueUrl": broker.queue_url(queue),
            "Attributes": {"MaximumMessageSize": "1024"},
        }
        if known:
            broker.client.set_queue_attributes(**smaller)
        url = with_options(broker.url, visibility_seconds=1)
        async with connect(prefetch=10, broker_url=url) as source:
            if not known:
                broker.client.set_queue_attributes(**smaller)
            messages = await take(source, 10)
            for message in messages:
                await source.retry(message, 0, "not now")
            again = await take(source, 10)
            assert Counter((m.id, m.attempt) for m in again) == Counter(
                (one, 2) for one in [*small, id]
            )
            [large] = [message for message in again if message.id == id]
            assert "could not be stored" in source.put_offs.reason
            await source.retry(large, 0, "not now")  # the next attempts are in this process, too
            (large,) = await take(source, 1)
            assert large.attempt == 3
            await asyncio.sleep(1.2)  # it still belongs to this consumer
            for message in again:
                await source.ack(message)
            assert not source.put_offs.reason
        await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=0))
        lost = find(events, "settlement_lost")
        assert [event["message_id"] for event in lost] == [id, id]
        assert known == ("SQS accepts 1024" in lost[0]["reason"])

    async def test_a_dead_letter_that_is_too_large_is_shortened_and_says_so(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        attributes = {"type": text("kind"), "large": text("y" * 900)}
        async with connect(prefetch=0):
            pass
        broker.client.set_queue_attributes(
            QueueUrl=broker.queue_url(f"{queue}-dead"), Attributes={"MaximumMessageSize": "1024"}
        )
        async with connect(prefetch=1) as source:
            for body in ("small", "x" * 5000):
                id = send_raw(broker, queue, body, MessageAttributes=attributes)
                (message,) = await take(source, 1)
                await source.reject(message, "bad")
                await eventually(1, source.count_dead_letters)
                [letter] = [letter async for letter in source.dead_letters(1)]
                assert (letter.id, letter.type, letter.reason) == (id, "kind", "bad")
                assert body.encode().startswith(letter.body)
                assert [moved async for moved in source.replay_dead_letters()] == [1]
                (message,) = await take(source, 1)
                assert message.headers == {"x-consumer-shortened": len(body)}
                await source.ack(message)
            assert 300 < len(message.body) < 1024

    async def test_a_dead_letter_that_sqs_moves_back_starts_with_attempt_1(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        """Like StartMessageMoveTask, the button of the console: body and attributes are unmodified."""
        async with connect(prefetch=1) as source:
            await publish(source, 1)
            for attempt in (1, 2, 3):
                (message,) = await take(source, 1)
                assert message.attempt == attempt
                await source.retry(message, 0, "again")
            (message,) = await take(source, 1)
            for _ in range(2):
                await source.reject(message, "bad")
                await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
                dead_url = broker.queue_url(f"{queue}-dead")
                received = broker.client.receive_message(
                    QueueUrl=dead_url, MessageAttributeNames=["All"]
                )
                [dead] = received["Messages"]
                attributes = dead["MessageAttributes"]
                send_raw(broker, queue, dead["Body"], MessageAttributes=attributes)
                broker.client.delete_message(QueueUrl=dead_url, ReceiptHandle=dead["ReceiptHandle"])
                (message,) = await take(source, 1)
                assert message.attempt == 1
            await source.ack(message)

    @pytest.mark.parametrize("which", ["both queues", "the dead-letter queue"])
    async def test_without_the_right_to_send_messages_are_put_off_and_no_neighbor_suffers(
        self,
        connect: Connect,
        broker: SqsServer,
        queue: str,
        events: list[Event],
        shorten: Callable[..., None],
        which: str,
    ) -> None:
        shorten(0.05, "FIRST_SECONDS")
        url = with_options(broker.url, visibility_seconds=1)
        async with connect(prefetch=4, broker_url=url) as source:
            published = await publish(source, 4)
            deny_sends(source, "" if which == "both queues" else f"{queue}-dead")
            good, bad, retried, other = await take(source, 4)
            await source.ack(good)
            await source.retry(retried, 0, "not now")
            await source.reject(bad, "bad")
            await source.ack(other)
            (retried,) = await take(source, 1)
            assert retried.attempt == 2
            await source.ack(retried)
            await asyncio.sleep(1.2)  # its visibility is extended
            assert source.connected
            assert "AccessDenied" in source.put_offs.reason
            source._client.meta.events.unregister(
                "before-call.sqs.SendMessageBatch", unique_id="deny"
            )
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=1))
            await eventually("", reason_of(source))
            [letter] = [letter async for letter in source.dead_letters(9)]
            assert (letter.id, letter.reason) == (bad.id, "bad")
        assert {event["message_id"] for event in find(events, "settlement_lost")} <= {
            bad.id,
            retried.id,
        }
        assert bad.id in published

    async def test_dead_letters_are_listed_and_stay_however_far_one_reads(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        async with connect(prefetch=25) as source:
            published = await publish(source, 25)
            for message in await take(source, 25):
                await source.reject(message, "bad")
            await eventually_counts(broker, queue, Counts(ready=0, delayed=0, dead=25))
            letters = source.dead_letters(100)
            assert (await anext(letters)).id in published
            await letters.aclose()  # type: ignore[attr-defined]
            assert Counter([letter.id async for letter in source.dead_letters(100)]) == Counter(
                published
            )
            assert broker.counts(queue).dead == 25
            assert [moved async for moved in source.replay_dead_letters()] == [10, 20, 25]
            assert Counter(await ack_all(source, 25)) == Counter(published)


@pytest.fixture
def following(broker: SqsServer, queue: str) -> Iterator[str]:
    """The name of an existing queue to publish to."""
    name = f"{queue}-next"
    broker.client.create_queue(QueueName=name)
    yield name
    broker.delete(name)


@pytest.fixture
def sns(broker: SqsServer) -> Any:
    return get_session().create_client("sns", **parse_url(broker.url).client_arguments)


def receive(broker: SqsServer, queue: str) -> list[dict[str, Any]]:
    """All messages in the queue, or ten of them."""
    received = broker.client.receive_message(
        QueueUrl=broker.queue_url(queue),
        MaxNumberOfMessages=10,
        MessageAttributeNames=["All"],
        AttributeNames=["All"],
        VisibilityTimeout=0,
    )
    messages: list[dict[str, Any]] = received.get("Messages", [])
    return messages


class TestPublishing:
    async def test_what_ten_handlers_publish_costs_one_request(
        self, connect: Connect, broker: SqsServer, following: str
    ) -> None:
        async with connect(prefetch=0) as source:
            requests = requests_of(source)
            to = f"queue:{following}"
            await asyncio.gather(
                *(source.publish([OutgoingMessage(b"%d" % n, to=to)]) for n in range(10))
            )
            assert requests == {"SendMessageBatch": 1, "GetQueueUrl": 1}
            await source.publish([OutgoingMessage(b"x", to=to) for _ in range(95)])
            assert requests == {"SendMessageBatch": 1 + 10, "GetQueueUrl": 1}
        await eventually_counts(broker, following, Counts(ready=105, delayed=0, dead=0))

    async def test_a_destination_that_does_not_exist_harms_no_other_message(
        self, connect: Connect, broker: SqsServer, queue: str, following: str
    ) -> None:
        async with connect(prefetch=1) as source:
            published = await publish(source, 1)
            missing = [
                (f"queue:{queue}-missing", f"the queue '{queue}-missing' does not exist"),
                (f"topic:{queue}-missing", f"the topic '{queue}-missing' does not exist"),
            ]
            for to, sentence in missing:
                good = asyncio.create_task(
                    source.publish([OutgoingMessage(b"x", to=f"queue:{following}")])
                )
                with pytest.raises(BrokerRefused) as refused:
                    await source.publish([OutgoingMessage(b"x", to=to)])
                assert str(refused.value) == f"{source._address}: {sentence}"
                await good
            assert await ack_all(source, 1) == published
            assert source.connectivity.outage_count == 0
            assert not broker.queue_url(f"{queue}-missing")
            await eventually_counts(broker, following, Counts(ready=2, delayed=0, dead=0))
            broker.delete(following)
            for _ in range(2):  # also if it existed before
                with pytest.raises(BrokerRefused, match=f"'{following}' does not exist"):
                    await source.publish([OutgoingMessage(b"x", to=f"queue:{following}")])
            broker.client.create_queue(QueueName=following)
            await source.publish([OutgoingMessage(b"x", to=f"queue:{following}")])
            assert source.connectivity.outage_count == 0

    async def test_a_message_that_a_queue_refuses_harms_no_other(
        self, connect: Connect, broker: SqsServer, queue: str, following: str
    ) -> None:
        broker.client.set_queue_attributes(
            QueueUrl=broker.queue_url(following), Attributes={"MaximumMessageSize": "1024"}
        )
        async with connect(prefetch=0) as source:
            outcomes = await asyncio.gather(
                *(
                    source.publish([OutgoingMessage(b"x" * size, to=f"queue:{following}")])
                    for size in (10, 2000, 20)
                ),
                return_exceptions=True,
            )
            assert outcomes[::2] == [None, None]
            assert isinstance(outcomes[1], BrokerRefused)
            assert f"the queue '{following}'" in str(outcomes[1])
            deny_sends(source, following)
            with pytest.raises(BrokerDenied, match=f"to the queue '{following}'"):
                await source.publish([OutgoingMessage(b"x", to=f"queue:{following}")])
            await publish(source, 1)  # to its own queue
        await eventually_counts(broker, following, Counts(ready=2, delayed=0, dead=0))

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"delay_seconds": 901}, "at most 900 seconds, and not by 901"),
            ({"to": "topic:t", "delay_seconds": 1}, "the topic 't' cannot delay a message"),
            ({"to": "queue:q.fifo", "delay_seconds": 1}, "the queue 'q.fifo' cannot delay a"),
            ({"to": "queue:a b"}, "'a b' cannot be the name or the ARN of a queue"),
            ({"to": "queue:https://sqs/1/q"}, "cannot be the name or the ARN of a queue"),
            ({"to": "topic:arn:aws:sqs:r:1:q"}, "cannot be the name or the ARN of a topic"),
        ],
    )
    async def test_what_sqs_cannot_do_is_one_sentence(
        self, connect: Connect, fields: dict[str, Any], sentence: str
    ) -> None:
        async with connect(prefetch=0) as source:
            with pytest.raises(BrokerRefused, match=sentence) as refused:
                await source.publish([OutgoingMessage(b"x", **fields)])
            assert "\n" not in str(refused.value)

    async def test_a_message_is_delayed_by_whole_seconds(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        async with connect(prefetch=1) as source:
            published_at = time.monotonic()
            await source.publish([OutgoingMessage(b"x", delay_seconds=0.4)])
            assert broker.counts(queue) == Counts(ready=0, delayed=1, dead=0)
            (message,) = await take(source, 1)
            assert time.monotonic() - published_at >= 0.9
            await source.ack(message)

    async def test_a_fifo_queue_gets_the_key_as_group_and_drops_a_repeated_id(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        name = f"{queue}-next.fifo"
        broker.client.create_queue(QueueName=name, Attributes={"FifoQueue": "true"})
        try:
            async with connect(prefetch=0) as source:
                to = f"queue:{name}"
                one = OutgoingMessage(b"1", to=to, key="customer-1", id="i-1")
                other = OutgoingMessage(b"2", to=to, id="größe")
                for _ in range(2):
                    await source.publish([one, other])
            first, second = receive(broker, name)
            assert first["Attributes"]["MessageGroupId"] == "customer-1"
            assert first["Attributes"]["MessageDeduplicationId"] == "i-1"
            token = second["Attributes"]["MessageGroupId"]  # of an id that SQS refuses as a group
            assert token == second["Attributes"]["MessageDeduplicationId"]
            assert len(token) == 64
            broker.client.purge_queue(QueueUrl=broker.queue_url(name))
            async with connect(prefetch=0) as source:  # in their order, although in two requests
                many = [OutgoingMessage(b"%d" % n, to=to, key="customer-2") for n in range(12)]
                await asyncio.gather(source.publish(many[:6]), source.publish(many[6:]))
            url, bodies = broker.queue_url(name), list[str]()
            for _ in range(2):
                received = broker.client.receive_message(QueueUrl=url, MaxNumberOfMessages=10)
                for message in received["Messages"]:
                    bodies.append(message["Body"])
                    handle = message["ReceiptHandle"]
                    broker.client.delete_message(QueueUrl=url, ReceiptHandle=handle)
            assert bodies == [str(n) for n in range(12)]
        finally:
            broker.delete(name)

    @pytest.mark.parametrize("by", ["name", "arn"])
    @pytest.mark.parametrize("raw", ["true", "false"], ids=["raw delivery", "in an envelope"])
    async def test_a_topic_passes_a_message_on_with_all_its_fields(
        self, connect: Connect, broker: SqsServer, queue: str, sns: Any, by: str, raw: str
    ) -> None:
        topic = sns.create_topic(Name=f"{queue}-events")["TopicArn"]
        arn = "QueueArn"
        async with connect(prefetch=3) as source:
            endpoint = broker.attributes(queue)[arn]
            options = {"RawMessageDelivery": raw}
            sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=endpoint, Attributes=options)
            fields: dict[str, Any] = {
                "to": f"topic:{topic if by == 'arn' else topic.rpartition(':')[2]}",
                "type": "order_created",
                "key": "k",
                "correlation_id": "c",
                "headers": {"tenant": "acme", "n": 1},
            }
            bodies = [b'{"id": 1}', b"\xff\x00", b""]
            outgoing = [OutgoingMessage(body, **fields) for body in bodies]
            await source.publish(outgoing)
            messages = {message.id: message for message in await take(source, 3)}
            for sent in outgoing:
                message = messages[sent.id]
                assert (message.body, message.type) == (sent.body, "order_created")
                assert (message.key, message.correlation_id) == ("k", "c")
                assert message.headers.items() >= {"tenant": "acme", "n": 1}.items()
                await source.ack(message)
        sns.delete_topic(TopicArn=topic)

    async def test_a_topic_is_found_by_its_name_beside_the_source_only(
        self, source_for: Callable[..., SqsBroker]
    ) -> None:
        async with source_for() as source:
            with pytest.raises(
                BrokerRefused, match=r"is in the account of the queue .* does not exist"
            ):
                await source.publish([OutgoingMessage(b"x", to="topic:orders")])

    async def test_a_handler_that_is_cancelled_harms_no_other(
        self, connect: Connect, broker: SqsServer, following: str
    ) -> None:
        async with connect(prefetch=0) as source:
            to = f"queue:{following}"
            await source.publish([OutgoingMessage(b"first", to=to)])
            publishing = [
                asyncio.create_task(source.publish([OutgoingMessage(b"x", to=to)]))
                for _ in range(9)
            ]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            publishing[4].cancel()
            outcomes = await asyncio.gather(*publishing, return_exceptions=True)
            assert outcomes[:4] + outcomes[5:] == [None] * 8


NOTIFICATION: dict[str, Any] = {
    "Type": "Notification",
    "MessageId": "n-1",
    "TopicArn": "arn:aws:sns:eu-central-1:1:orders",
    "Subject": "An order",
    "Message": '{"id": "o-1"}',
    "Timestamp": "2026-01-02T03:04:05.678Z",
    "MessageAttributes": {
        "type": {"Type": "String", "Value": "order_created"},
        "token": {"Type": "Binary", "Value": "/wA="},
        "size": {"Type": "Number", "Value": "12.50"},
    },
}
EVENT: dict[str, Any] = {
    "version": "0",
    "id": "e-1",
    "detail-type": "OrderCreated",
    "source": "shop",
    "time": "2026-01-02T03:04:05Z",
    "detail": {"id": "o-1", "name": "Zürich"},
}


@pytest.mark.usefixtures("broker")
class TestEnvelopes:
    """Envelopes of SNS, EventBridge and S3: stored copies stay unchanged."""

    async def test_it_survives_a_retry_a_dead_letter_and_a_replay(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        body = json.dumps(NOTIFICATION, indent=1)
        async with connect(prefetch=1) as source:
            send_raw(broker, queue, body)
            for attempt in (1, 2):
                (message,) = await take(source, 1)
                assert (message.id, message.type) == ("n-1", "order_created")
                assert (message.body, message.attempt) == (b'{"id": "o-1"}', attempt)
                assert message.headers == {
                    "Subject": "An order",
                    "token": b"\xff\x00",
                    "size": "12.50",
                }
                assert message.published_at is not None
                assert message.published_at.isoformat().startswith("2026-01-02T03:04:05.678")
                assert message.origin["topic"] == "orders"
                if attempt == 1:
                    await source.retry(message, 0, "again")
            await source.reject(message, "bad")
            await eventually(1, source.count_dead_letters)
            [dead] = receive(broker, f"{queue}-dead")
            assert dead["Body"] == body
            [letter] = [letter async for letter in source.dead_letters(1)]
            assert (letter.id, letter.type, letter.body) == ("n-1", "order_created", message.body)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            (again,) = await take(source, 1)
            assert (again.id, again.type, again.attempt) == ("n-1", "order_created", 1)
            assert (again.body, again.origin) == (message.body, message.origin)
            await source.ack(again)

    def unpack(self, body: object, **attributes: str) -> Message:
        named = {name: text(value) for name, value in attributes.items()}
        raw = {"Body": json.dumps(body), "MessageId": "m-1", "ReceiptHandle": "r"}
        return sqs._unpack({**raw, "MessageAttributes": named})[0]

    def test_an_event_of_eventbridge_is_its_detail_with_its_fields_as_headers(self) -> None:
        message = self.unpack(EVENT)
        assert (message.id, message.type) == ("e-1", "OrderCreated")
        assert message.body == '{"id": "o-1", "name": "Zürich"}'.encode()
        assert message.headers == {"version": "0", "source": "shop", "time": EVENT["time"]}
        assert message.published_at is not None
        assert message.published_at.isoformat() == "2026-01-02T03:04:05+00:00"

    def test_an_event_may_come_through_a_topic(self) -> None:
        attributes = {"MessageAttributes": {}, "Message": json.dumps(EVENT)}
        message = self.unpack({**NOTIFICATION, **attributes})
        assert (message.id, message.type) == ("e-1", "OrderCreated")
        assert message.origin["topic"] == "orders"

    def test_an_attribute_of_the_queue_comes_before_those_of_an_envelope(self) -> None:
        assert self.unpack(NOTIFICATION, type="mine").type == "mine"
        assert self.unpack(EVENT, type="mine").type == "mine"

    @pytest.mark.parametrize(
        ("body", "type"),
        [
            ({"Service": "Amazon S3", "Event": "s3:TestEvent"}, "s3:TestEvent"),
            (
                {"Records": [{"eventSource": "aws:s3", "eventName": "ObjectCreated:Put"}]},
                "ObjectCreated:Put",
            ),
            (
                {"Records": [{"eventSource": "aws:s3", "eventName": name} for name in "ab"]},
                "",
            ),
            ({"Records": {"eventSource": "aws:s3"}}, ""),
            ({"Records": [{"eventSource": "aws:s3"}, 5]}, ""),
        ],
    )
    def test_a_notification_of_s3_is_itself(self, body: dict[str, Any], type: str) -> None:
        message = self.unpack(body)
        assert (message.id, message.type) == ("m-1", type)
        assert json.loads(message.body) == body

    @pytest.mark.parametrize(
        "body",
        [
            {**NOTIFICATION, "Type": "SubscriptionConfirmation"},
            {**NOTIFICATION, "Message": 5},
            {**NOTIFICATION, "TopicArn": None},
            {"detail-type": "x", "detail": 1},
            {**EVENT, "detail-type": 5},
            '"TopicArn" "detail-type" "aws:s3"',
            ["TopicArn", "detail-type", "aws:s3", "s3:TestEvent"],
        ],
    )
    def test_what_only_looks_like_an_envelope_is_the_body(self, body: object) -> None:
        message = self.unpack(body)
        assert (message.id, message.type) == ("m-1", "")
        assert json.loads(message.body) == body

    @pytest.mark.parametrize(
        "change",
        [
            {"MessageAttributes": None},
            {
                "MessageAttributes": {
                    "type": 5,
                    "a": {"Value": None},
                    "b": {"Value": "x", "Type": 1},
                }
            },
            {"MessageAttributes": {"b": {"Type": "Binary", "Value": "?"}}},
            {"MessageAttributes": {"x-consumer": {"Type": "String", "Value": "["}}},
            {"Timestamp": "soon", "MessageId": [], "Subject": 5},
            {"Timestamp": 5, "TopicArn": "\ud800", "Message": "\ud800"},
        ],
    )
    def test_odd_fields_of_an_envelope_are_left_out(self, change: dict[str, Any]) -> None:
        message = self.unpack({**NOTIFICATION, **change})
        assert message.body == (b"?" if "Message" in change else b'{"id": "o-1"}')
        assert isinstance(message.id, str)

    @pytest.mark.parametrize("detail", [None, "\ud800", [1.5, {"a": []}], 10**40, ""])
    def test_a_detail_may_be_anything(self, detail: object) -> None:
        message = self.unpack({**EVENT, "detail": detail})
        assert (json.loads(message.body), message.type) == (detail, "OrderCreated")

    def test_a_compressed_body_is_base64(self) -> None:
        body = base64.b64encode(gzip.compress(b"text")).decode()
        raw = {"Body": body, "MessageId": "m-1", "ReceiptHandle": "r"}
        for name in ("content-encoding", "Content-Encoding"):
            message, _ = sqs._unpack({**raw, "MessageAttributes": {name: text("gzip")}})
            assert (gzip.decompress(message.body), message.content_encoding) == (b"text", "gzip")
            assert sqs._pack_again(message)["MessageBody"] == body
        message, _ = sqs._unpack(raw)
        assert message.body == body.encode()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
OUR_FIELDS = ["id", "headers", "attempts", "encoding", "due_at", "reason", "dead_lettered_at"]
ENVELOPES = st.dictionaries(
    st.sampled_from([*OUR_FIELDS, "attributes"]), JSON | st.sampled_from(["base64", "empty"])
)
STRINGS = st.builds(text, st.text())
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["type", "x-consumer-attempts"]) | st.text(min_size=1),
    STRINGS | st.builds(lambda v: {"DataType": "Binary", "BinaryValue": v}, st.binary()),
    max_size=10,
)


SMALL = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(), SCALARS, max_size=2)
FOREIGN = st.fixed_dictionaries(
    {},
    optional={
        "Type": st.just("Notification"),
        "TopicArn": SCALARS,
        "Message": st.text() | SMALL.map(json.dumps),
        "MessageAttributes": st.dictionaries(st.text(), SMALL, max_size=2) | SMALL,
        "Records": st.just([{"eventSource": "aws:s3"}]) | SMALL,
        **dict.fromkeys(("MessageId", "Timestamp", "detail-type", "detail"), SMALL),
        **dict.fromkeys(("source", "id", "time", "Service", "Event"), SMALL),
    },
)
"""Envelopes of SNS, EventBridge and S3, and similar JSON."""


@given(st.text() | FOREIGN.map(json.dumps), ENVELOPES.map(json.dumps) | st.text(), ATTRIBUTES)
def test_whatever_other_producers_send_is_a_message_and_can_be_sent_again(
    broker: SqsServer, body: str, envelope: str, attributes: dict[str, Any]
) -> None:
    raw = {"Body": body, "MessageId": "id-1", "ReceiptHandle": "r"}
    message, read = sqs._unpack(
        {**raw, "MessageAttributes": {**attributes, "x-consumer": text(envelope)}}
    )
    assert all(isinstance(value, str) for value in (message.id, message.type))
    assert message.attempt >= 1
    letter = sqs._dead_letter(message, read, raw)
    assert isinstance(letter.reason, str)
    entry = sqs._pack_again(message, attempts=message.attempt)
    again, _ = sqs._unpack({**raw, "Body": entry["MessageBody"], **entry})
    assert (again.id, again.type, again.body) == (message.id, message.type, message.body)
    assert again.headers.keys() == message.headers.keys()
    assert again.receipt.body == message.receipt.body


class TestTopology:
    @pytest.mark.parametrize("source", ["orders.created", "a" * 76, "größe", "o/o"])
    def test_a_name_that_sqs_does_not_take_is_one_sentence(
        self, source_for: Callable[..., SqsBroker], source: str
    ) -> None:
        with pytest.raises(BrokerRefused, match=r"^CONSUMER_SOURCE: .* cannot be a queue"):
            source_for(source=source)

    def test_a_fifo_queue_is_refused(self, source_for: Callable[..., SqsBroker]) -> None:
        with pytest.raises(BrokerRefused, match="FIFO queues are not supported"):
            source_for(source="orders.fifo")

    async def test_looking_creates_nothing(
        self, source_for: Callable[..., SqsBroker], broker: SqsServer, queue: str
    ) -> None:
        async with source_for() as source:
            described = await source.describe()
            assert described[queue] == described[f"{queue}-dead"] == "does not exist"
            assert await source.count_dead_letters() == 0
            assert [letter async for letter in source.dead_letters(9)] == []
            assert [moved async for moved in source.replay_dead_letters()] == []
            assert [gone async for gone in source.purge_dead_letters()] == []
            with pytest.raises(BrokerRefused, match=f"the queue '{queue}' does not exist"):
                await publish(source, 1)
        assert not broker.queue_url(queue)
        assert not broker.queue_url(f"{queue}-dead")

    async def test_the_redrive_policy_of_an_existing_queue_names_its_dead_letters(
        self, connect: Connect, broker: SqsServer, queue: str, events: list[Event]
    ) -> None:
        graveyard = f"{queue}-graveyard"
        url = broker.client.create_queue(QueueName=graveyard)["QueueUrl"]
        try:
            arn = broker.attributes(graveyard)["QueueArn"]
            policy = {"deadLetterTargetArn": arn, "maxReceiveCount": 7}
            broker.client.create_queue(
                QueueName=queue,
                Attributes={"RedrivePolicy": json.dumps(policy), "VisibilityTimeout": "77"},
            )
            async with connect(prefetch=1) as source:
                await publish(source, 1)
                (message,) = await take(source, 1)
                await source.reject(message, "bad")
                await eventually(1, source.count_dead_letters)
                described = await source.describe()
            assert (described[queue], described[graveyard]) == (0, 1)
            assert str(described[f"{queue} deliveries at most"]).startswith("7, which is few: ")
            [warning] = find(events, "few_deliveries")
            assert (warning["queue"], warning["most"]) == (queue, 7)
            assert broker.attributes(queue)["VisibilityTimeout"] == "77"
            assert not broker.queue_url(f"{queue}-dead")
        finally:
            broker.client.delete_queue(QueueUrl=url)

    @pytest.mark.parametrize("deleted", ["queue", "dead-letter queue"])
    async def test_a_queue_of_operations_that_is_deleted_is_waited_for(
        self,
        connect: Connect,
        broker: SqsServer,
        queue: str,
        events: list[Event],
        shorten: Callable[..., None],
        deleted: str,
    ) -> None:
        """The queue is never created again as the service's own."""
        shorten(0.2, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")
        graveyard = f"{queue}-graveyard"
        gone = queue if deleted == "queue" else graveyard

        def create() -> None:
            broker.client.create_queue(QueueName=graveyard)
            arn = broker.attributes(graveyard)["QueueArn"]
            policy = {"deadLetterTargetArn": arn, "maxReceiveCount": 50}
            attributes = {"RedrivePolicy": json.dumps(policy), "VisibilityTimeout": "77"}
            broker.client.create_queue(QueueName=queue, Attributes=attributes)

        async def is_waited_for() -> bool:
            told = [str(event["reason"]) for event in find(events, "reconnecting")]
            return any(f"'{gone}' does not exist: create it again, as it was" in t for t in told)

        create()
        try:
            async with connect(prefetch=1) as source:
                await publish(source, 1)
                (message,) = await take(source, 1)
                await asyncio.to_thread(broker.delete, gone)
                await source.reject(message, "bad")
                await eventually(True, is_waited_for)
                assert not broker.queue_url(gone)
                create()
                await eventually(1, source.count_dead_letters)
                published = await publish(source, 1)
                assert (await ack_all(source, 1)) == published
            assert broker.attributes(queue)["VisibilityTimeout"] == "77"
            assert not broker.queue_url(f"{queue}-dead")
        finally:
            broker.delete(graveyard)

    async def test_a_queue_without_a_redrive_policy_stays_so(
        self, connect: Connect, broker: SqsServer, queue: str
    ) -> None:
        broker.client.create_queue(QueueName=queue)
        async with connect(prefetch=0) as source:
            described = await source.describe()
        assert described[f"{queue} deliveries at most"] == "no limit"
        assert described[f"{queue}-dead"] == 0
        assert "RedrivePolicy" not in broker.attributes(queue)


AWS_SECRET = "wJalrXUtnFEMI/K7MDENG+bPx=:@#"


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "region", "endpoint"),
        [
            ("sqs://eu-central-1", "eu-central-1", None),
            ("sqs://us-gov-west-1/?wait_seconds=20", "us-gov-west-1", None),
            ("sqs://localhost:4566", "us-east-1", "http://localhost:4566"),
            ("sqs://localhost:4566?tls=true", "us-east-1", "https://localhost:4566"),
            ("sqs://[::1]:4566/eu-west-3", "eu-west-3", "http://[::1]:4566"),
            ("sqs://queue.internal/eu-west-3", "eu-west-3", "https://queue.internal"),
            ("sqs://127.0.0.1.example.com", "us-east-1", "https://127.0.0.1.example.com"),
            ("sqs://broker:5000/eu-west-3?tls=false", "eu-west-3", "http://broker:5000"),
            (
                "sqs://sqs.eu-central-1.amazonaws.com",
                "eu-central-1",
                "https://sqs.eu-central-1.amazonaws.com",
            ),
            (
                "sqs://vpce-1-ab.sqs.cn-north-1.vpce.amazonaws.com.cn",
                "cn-north-1",
                "https://vpce-1-ab.sqs.cn-north-1.vpce.amazonaws.com.cn",
            ),
            (
                "sqs://sqs-fips.us-gov-west-1.api.aws/us-gov-east-1",
                "us-gov-east-1",
                "https://sqs-fips.us-gov-west-1.api.aws",
            ),
        ],
    )
    def test_a_url_names_a_region_or_a_server(
        self, broker: SqsServer, url: str, region: str, endpoint: str | None
    ) -> None:
        address = parse_url(url)
        assert (address.region, address.endpoint, address.key) == (region, endpoint, None)

    def test_a_secret_may_have_any_character(self, broker: SqsServer) -> None:
        address = parse_url(f"sqs://AKIA:{quote(AWS_SECRET, safe='')}@eu-central-1")
        assert (address.region, address.endpoint) == ("eu-central-1", None)
        assert (address.key, address.secret) == ("AKIA", AWS_SECRET)

    @pytest.mark.parametrize(
        "url",
        [
            "sqs://",
            "sqs:///eu-central-1",
            f"sqs://AKIA:{AWS_SECRET}@eu-central-1",
            "sqs://AKIA:bPx/FEMI@host:1/",
            "sqs://AKIA:bPx#FEMI@host:1/",
            "sqs://AKIA:bPx?FEMI@host:1/",
            "sqs://bPxFEMI@host:1/",
            "sqs://AKIA:bPxFEMI@host:port/",
            "sqs://AKIA:bPxFEMI@host:1/a/b",
            "sqs://AKIA:bPxFEMI@host:1/?wait_seconds=0",
            "sqs://AKIA:bPxFEMI@host:1/?wait_seconds=soon",
            "sqs://AKIA:bPxFEMI@host:1/?visibility_seconds=50000",
            "sqs://AKIA:bPxFEMI@host:1/?tls=yes",
            "sqs://AKIA:bPxFEMI@host:1/?region=x",
            "sqs://AKIA:bPxFEMI@host:1/?cafile=/missing.pem",
            "sqs://AKIA:bPxFEMI@eu-central1",
            "sqs://AKIA:bPxFEMI@sqs.eu-central-1.amazonaws.com/?tls=false",
        ],
    )
    def test_an_invalid_url_is_one_sentence_without_the_secret(
        self, broker: SqsServer, url: str
    ) -> None:
        with pytest.raises(BrokerRefused, match=r"^CONSUMER_BROKER_URL: ") as caught:
            parse_url(url)
        assert "\n" not in str(caught.value)
        assert "bPx" not in str(caught.value)
        assert "FEMI" not in str(caught.value)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that checks credentials, and has none."""
    try:
        with moto(tmp_path_factory.mktemp("strict")) as url:
            port = urlsplit(url).port
            # The number of requests that it accepts before it checks: none.
            headers = {"Content-Type": "text/plain"}
            reset = f"http://127.0.0.1:{port}/moto-api/reset-auth"
            with urlopen(Request(reset, data=b"0", headers=headers)):
                yield url
    except ServerMissing as missing:
        skip_without_server(missing)


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "status", "kind"),
        [
            ("RequestTimeout", 408, BrokerUnavailable),
            ("RequestThrottled", 403, BrokerUnavailable),
            ("InternalFailure", 500, BrokerUnavailable),
            ("AccessDenied", 403, BrokerDenied),
            ("AccessDeniedException", 400, BrokerDenied),
            ("ExpiredToken", 403, BrokerDenied),
            ("InvalidParameterValue", 400, BrokerRefused),
        ],
    )
    def test_an_error_is_an_outage_a_missing_right_or_a_refusal(
        self,
        broker: SqsServer,
        source_for: Callable[..., SqsBroker],
        code: str,
        status: int,
        kind: type[Exception],
    ) -> None:
        answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        translated = source_for()._requests.translated(ClientError(answer, "ReceiveMessage"))
        assert type(translated) is kind
        assert code in str(translated)


class TestCredentials:
    async def test_wrong_ones_are_one_sentence(
        self, source_for: Callable[..., SqsBroker], strict: str
    ) -> None:
        with pytest.raises(BrokerDenied, match="InvalidClientTokenId") as caught:
            await source_for(broker_url=strict).__aenter__()
        assert "\n" not in str(caught.value)
        assert SECRET not in repr(caught.value)

    async def test_none_at_all_is_one_sentence(
        self, source_for: Callable[..., SqsBroker], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/missing")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/missing")
        with pytest.raises(BrokerDenied, match="no credentials were found"):
            await source_for(broker_url=f"sqs://localhost:{proxy.port}").__aenter__()

    async def test_credentials_of_the_environment_are_used_without_any_in_the_url(
        self, connect: Connect, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        async with connect(
            prefetch=0, broker_url=f"sqs://localhost:{proxy.port}/us-east-1"
        ) as source:
            await source.describe()
