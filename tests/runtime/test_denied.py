"""A login or a right that is refused in mid-run is an outage: an administrator fixes it without a restart."""

import asyncio
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from consumer_harness import AT_ONCE, ConsumerHarness, Number, done, numbers
from denying import DENIED, OF, OWN, Access, access_to
from following import Next
from harness.contract import Connect, eventually, opened, take
from harness.process import ServiceProcess, ask
from harness.scene import AT_ONCE_SECONDS, Scene, assert_clean_shutdown, wait_until
from harness.servers import Server, ServerMissing, skip_without_server
from harness.servers.local import free_port
from runtime.brokers import make_source
from runtime.errors import ExitCode
from runtime.message import Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import Event, ack_all, find, last, publish, start_once

pytestmark = [pytest.mark.slow, pytest.mark.very_slow]


@pytest.fixture(params=["login", "right"])
def what(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=OF)
def access(request: pytest.FixtureRequest, what: str, tmp_path: Path) -> Iterator[Access]:
    if what == "unseen destination" and request.param != "kafka":
        pytest.skip("only Kafka has a right to know of a destination")
    directory = tmp_path / "server"
    directory.mkdir()
    try:
        with access_to(request.param, directory, what) as access:
            yield access
    except ServerMissing as missing:
        skip_without_server(missing)


@pytest.fixture
def broker(access: Access) -> Server:
    """The server of `scene`."""
    return access.server


@pytest.fixture
def queue() -> str:
    """The queue is not deleted: the server is this test's own."""
    return f"ccc-test-{uuid.uuid4().hex[:12]}"


def readiness(process: ServiceProcess, port: int) -> str:
    assert process.child.poll() is None, process.events
    return ask(port, "/readyz")[1]


def test_a_refusal_in_mid_run_is_an_outage_and_at_the_start_an_exit(
    scene: Scene, access: Access
) -> None:
    port = free_port()
    process = scene.start(url=access.url, probe_port=port, concurrency=2)
    scene.publish(1, seconds=3)
    process.wait_for("handling")
    access.deny()
    wait_until(lambda: re.search(access.refusal, readiness(process, port)) is not None)
    scene.publish(2 if access.stores_meanwhile else 0)
    assert ask(port, "/readyz")[0] == 503
    assert ask(port, "/livez")[0] == 200
    told = [e["reason"] for e in process.find("reconnecting") if "level" in e]
    assert re.search(access.refusal, told[-1])
    assert len(told) <= 2
    new = scene.start(url=access.url, consuming=False)
    assert new.wait() == ExitCode.DENIED, new.events
    access.allow()
    wait_until(lambda: set(scene.ledger.ended) == set(scene.published))
    wait_until(lambda: ask(port, "/readyz")[0] == 200)
    (last,) = scene.publish(1, seconds=1)
    process.wait_for("handling", task=last)
    access.deny()
    wait_until(lambda: re.search(access.refusal, readiness(process, port)) is not None)
    assert assert_clean_shutdown(process, signal.SIGTERM) < 1 + AT_ONCE_SECONDS
    assert last in scene.ledger.ended
    access.allow()


@pytest.mark.parametrize("what", ["ack"])
async def test_an_ack_that_is_refused_waits_until_it_is_allowed_again(
    connect: Connect, access: Access, queue: str, events: list[Event]
) -> None:
    async def left() -> int:
        counts = await asyncio.to_thread(access.server.counts, queue)
        return counts.ready + counts.held + counts.delayed + counts.dead

    async with connect(broker_url=access.url) as source:
        await publish(source, 3)
        first, second, third = await take(source, 3)
        await source.ack(first)
        await eventually(2, left)
        await asyncio.to_thread(access.deny)
        await source.ack(second)
        await source.ack(third)

        async def refusal_is_told() -> bool:
            told = [str(e.get("reason")) for e in events if e["event"] == "reconnecting"]
            return any(re.search(access.refusal, reason) for reason in told)

        await eventually(True, refusal_is_told)
        await asyncio.to_thread(access.allow)
        if not access.keeps_acks:
            assert sorted(await ack_all(source, 2)) == sorted([second.id, third.id])
        await eventually(0, left)

        async def connected() -> bool:
            return bool(source.connected)

        await eventually(True, connected)
        assert source.buffer.failure is None
        assert len(source.buffer) == 0
    lost = {event["message_id"] for event in find(events, "settlement_lost")}
    assert lost == (set() if access.keeps_acks else {second.id, third.id})


@pytest.mark.parametrize("what", ["login"])
def test_a_password_that_is_rotated_in_its_file_is_taken_up_without_a_restart(
    scene: Scene, access: Access, tmp_path: Path
) -> None:
    """The new password is masked like the first. An unusable file meanwhile ends nothing."""
    port, file = free_port(), tmp_path / "broker-url"
    file.write_text(access.url)
    process = scene.start(
        broker_url="", broker_url_file=file, probe_port=port, concurrency=2, log_level="debug"
    )
    scene.publish(1)
    wait_until(lambda: scene.ledger.ended == scene.published)
    access.deny()
    wait_until(lambda: re.search(access.refusal, readiness(process, port)) is not None)
    place = urlsplit(access.rotated_url).netloc.rpartition("@")[2]
    for useless in (access.rotated_url.replace(place, "localhost:1"), "", "nonsense"):
        file.write_text(useless)
        failed_count = len(process.find("reconnect_failed"))
        wait_until(lambda: len(process.find("reconnect_failed")) > failed_count + 1)  # noqa: B023
        assert re.search(access.refusal, readiness(process, port))
    replaced = tmp_path / "new"
    replaced.write_text(f"{access.rotated_url}\n")
    replaced.replace(file)
    wait_until(lambda: ask(port, "/readyz")[0] == 200)
    scene.publish(2)
    wait_until(lambda: set(scene.ledger.ended) == set(scene.published))
    assert process.stop(signal.SIGTERM)[0] == 0, process.events
    logged = str(process.events) + process.stderr
    for url in (access.url, access.rotated_url):
        assert (urlsplit(url).password or "") not in logged


@pytest.mark.parametrize("what", ["destination", "unseen destination"])
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batch"])
async def test_a_missing_right_to_the_destination_alone_is_a_dead_letter_with_that_reason(
    harness: ConsumerHarness,
    access: Access,
    queue: str,
    settings_for: Callable[..., ConsumerSettings],
    batched: bool,
) -> None:
    """The user may read the source, and write to everything else: other messages are published."""
    settings: dict[str, Any] = {**AT_ONCE, "broker_url": access.url, "max_attempts": 2}
    async with opened(
        make_source(settings_for(**settings))
    ):  # makes the tables, if there are tables
        pass
    await asyncio.to_thread(access.deny)
    following = Next(settings_for(source=f"{queue}-next", broker_url=access.url))
    await following.declare()
    await start_once(settings_for(**settings))

    async def publish_one(event: Number, message: Message) -> OutgoingMessage:
        to = access.destination if event.number == 1 else following.to
        return OutgoingMessage(event, to=to, caused_by=message)

    async def publish_all(events: list[Number], messages: list[Message]) -> list[OutgoingMessage]:
        return [await publish_one(*both) for both in zip(events, messages, strict=True)]

    if batched:
        settings |= {"batch_size": 3, "batch_seconds": 1}
    handlers = {"n": publish_all if batched else publish_one}
    _, consumer = await harness.run(
        numbers(3), done(3), message_type="n", handlers=handlers, **settings
    )
    assert (consumer.handled_count, consumer.rejected_count) == (2, 1)
    [retried], [rejected] = map(harness.events, ("message_retried", "message_rejected"))
    assert retried["message_id"] == rejected["message_id"]
    assert re.search(access.refusal, rejected["reason"])
    assert DENIED in rejected["reason"]
    assert not harness.events("reconnecting")
    async with following.consuming() as source, asyncio.timeout(30):
        bodies = set[bytes]()
        while len(bodies) < 2:  # some of a batch are sent twice
            message = await anext(source)
            bodies.add(message.body)
            await source.ack(message)
    assert bodies == {b'{"number":0}', b'{"number":2}'}
    async with make_source(settings_for(**settings)) as source:
        if source.capabilities.dead_letters:
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert (letter.reason, letter.attempts) == (rejected["reason"], 2)


@pytest.mark.parametrize("what", ["undocumented"])
@pytest.mark.parametrize("access", ["kafka", "sqs"], indirect=True)
async def test_the_rights_that_the_page_names_are_enough(
    access: Access, settings_for: Callable[..., ConsumerSettings], events: list[Event]
) -> None:
    """Each other broker has such a test in its own file."""
    source, group = OWN
    about = {"source": source, "group": group, "retry_seconds": 0.1, "retry_max_seconds": 0.4}
    async with make_source(settings_for(**about)) as owner:
        await owner.declare()
    await asyncio.to_thread(access.deny)
    async with opened(make_source(settings_for(broker_url=access.url, **about), 5)) as service:
        await service.start()
        await publish(service, 3)
        done, later, bad = await take(service, 3)
        await service.publish_and_ack(done, [OutgoingMessage(b"x", to=access.destination)])
        await service.retry(later, 0.1, "not now")
        await service.reject(bad, "bad")
        assert await ack_all(service, 1) == [later.id]
        await eventually(1, service.count_dead_letters)
        assert [letter.id async for letter in service.dead_letters(2)] == [bad.id]
        assert await last(service.replay_dead_letters()) == 1
        assert await ack_all(service, 1) == [bad.id]
        assert await last(service.purge_dead_letters()) == 0
        await service.describe()
        await service.stop()
    assert not {"reconnecting", "settlement_lost"} & {event["event"] for event in events}
