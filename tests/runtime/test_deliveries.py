"""A message that kills its process, on every broker that counts deliveries; and how the message is found afterwards."""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from harness.contract import Connect, Counted, need, opened, take
from harness.scene import Scene, assert_clean_shutdown, wait_until
from harness.servers.nats import NatsServer
from runtime.brokers import make_source
from runtime.message import DeadLetter, Message
from runtime.settings import ConsumerSettings
from runtime.suspects import Suspects
from steps import publish, scene_needs

MOST = 3


def letters_of(scene: Scene) -> list[DeadLetter]:
    async def read() -> list[DeadLetter]:
        async with opened(make_source(scene.settings)) as source:
            return [letter async for letter in source.dead_letters(10)]

    return asyncio.run(read())


@pytest.mark.slow
def test_a_message_that_kills_its_process_ends_as_a_dead_letter_and_no_other_does(
    scene: Scene, tmp_path: Path
) -> None:
    scene_needs(scene, "counts_crashes", "dead_letters")
    healthy = scene.publish(4)
    scene.publish(1, end="exit")
    healthy += scene.publish(8)
    file = tmp_path / "termination-log"
    file.touch()

    def start() -> None:
        scene.start(
            url=scene.broker.impatient_url, max_deliveries=MOST, TERMINATION_MESSAGE_PATH=file
        )

    def is_settled() -> bool:
        """Restart the service when it has died, like a supervisor."""
        if (exit_code := scene.processes[-1].child.poll()) is not None:
            assert exit_code == 137
            # On NATS, a message that had not begun before the limit, since others came first, kills once more.
            assert len(scene.processes) <= MOST + 1, "it kills more processes than it may"
            start()
        return set(scene.ledger.ended) >= set(healthy) and scene.broker.counts(scene.queue).dead > 0

    start()
    wait_until(is_settled, seconds=60)
    assert_clean_shutdown(scene.processes[-1])
    assert len(scene.processes) > 2  # NATS may count a delivery that a dead process did not take
    assert file.read_text().startswith("{")  # only the receipt
    assert "task-4" not in scene.ledger.ended
    scene.assert_left(dead=1)
    [letter] = letters_of(scene)
    assert b'"task-4"' in letter.body
    assert re.fullmatch(
        r"delivered [34] times without being settled: it may kill its process", letter.reason
    )


async def test_a_message_that_was_requeued_often_is_not_suspected_to_kill_its_process(
    connect: Connect, counted: Counted
) -> None:
    """Rolling restarts requeue it, at work in a handler or before a worker took it."""
    async with connect(prefetch=0) as source:
        need(source, "counts_crashes")
        published = await publish(source, 2)
    for _ in range(4 * MOST):
        async with connect(prefetch=2, max_deliveries=MOST) as source:
            (message,) = await take(source, 1)
            assert message.deliveries <= MOST
            await source.stop()
            await source.requeue(message)
    async with connect(prefetch=2, max_deliveries=MOST) as source:
        left = await take(source, 2)
        assert sorted(message.id for message in left) == sorted(published)
        assert max(message.deliveries for message in left) <= MOST
        for message in left:
            await source.ack(message)
    await counted()


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["nats"], indirect=True, scope="session")
def test_of_suspects_that_come_in_another_order_none_is_rejected_that_only_waited(
    scene: Scene,
) -> None:
    """NATS redelivers in the order in which ack waits end: another message may come first each time."""
    [neighbour] = scene.publish(1)
    scene.publish(1, end="exit")

    async def die_beside_both(client: Any) -> None:
        names = {"durable": scene.queue, "stream": scene.queue}
        pull = await client.jetstream().pull_subscribe_bind(**names)
        for _ in range(MOST):
            for message in await pull.fetch(2):
                await message.nak()

    cast(NatsServer, scene.broker).ask(die_beside_both)
    for exit_code in (137, 0):
        process = scene.start(url=scene.broker.impatient_url, max_deliveries=MOST)
        if exit_code:
            assert process.wait() == exit_code
    wait_until(lambda: scene.broker.counts(scene.queue).dead > 0)
    assert_clean_shutdown(process)
    assert scene.ledger.ended == [neighbour]
    [letter] = letters_of(scene)
    assert b'"task-1"' in letter.body


@pytest.mark.slow
def test_a_suspect_that_was_requeued_begins_anew(scene: Scene, broker_name: str) -> None:
    """It may have been in flight beside the message that killed the process: another process must not reject it."""
    scene_needs(scene, "counts_crashes")
    scene.publish(1, seconds=60)
    settings: dict[str, Any] = {"url": scene.broker.impatient_url, "max_deliveries": 2}
    killed = scene.start(**settings)
    killed.wait_for("handling")
    killed.stop(signal.SIGKILL)
    # SQS also counts the delivery to a poll of the process that is shutting down.
    for deliveries in ({2}, {1, 2} if broker_name == "sqs" else {1}):
        process = scene.start(drain_seconds=0, **settings)  # requeued at the deadline
        assert process.wait_for("handling")["deliveries"] in deliveries
        process.stop()


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session")
def test_a_suspect_that_hangs_keeps_one_worker_and_no_healthy_message_waits_for_it(
    scene: Scene,
) -> None:
    scene.publish(3, seconds=60)
    settings: dict[str, Any] = {
        "url": scene.broker.impatient_url,
        "max_deliveries": 2,
        "concurrency": 3,
        "prefetch": 9,
    }
    killed = scene.start(**settings)
    killed.wait_for("handling", count=3)
    killed.stop(signal.SIGKILL)
    process = scene.start(drain_seconds=0, **settings)
    process.wait_for("handling")
    healthy = scene.publish(9)
    wait_until(lambda: set(scene.ledger.ended) >= set(healthy))
    exit_code, _ = process.stop()
    assert exit_code == 75
    [draining] = process.find("draining")
    assert draining["in_flight"] == 1
    [drained] = process.find("drained")
    assert drained["requeued"] == 3
    scene.assert_left(ready=3)


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session")
def test_a_suspect_that_waits_for_another_does_not_begin_after_the_signal(scene: Scene) -> None:
    scene.publish(2, seconds=1)
    settings: dict[str, Any] = {"url": scene.broker.impatient_url, "max_deliveries": 2}
    killed = scene.start(**settings)
    killed.wait_for("handling", count=2)
    killed.stop(signal.SIGKILL)
    process = scene.start(**settings)
    process.wait_for("handling")
    assert_clean_shutdown(process)
    assert len(process.find("handling")) == 1
    [drained] = process.find("drained")
    assert drained["requeued"] == 1
    scene.assert_left(ready=1)


@pytest.mark.slow
def test_a_suspect_that_was_retried_begins_anew(scene: Scene) -> None:
    scene_needs(scene, "counts_crashes", "delayed_retry")
    scene.publish(1, seconds=1, end="raise")
    settings: dict[str, Any] = {
        "url": scene.broker.impatient_url,
        "max_deliveries": 2,
        "retry_seconds": 0.1,
    }
    killed = scene.start(**settings)
    killed.wait_for("handling")
    killed.stop(signal.SIGKILL)
    process = scene.start(**settings)
    assert process.wait_for("handling", attempt=1)["deliveries"] == 2
    assert process.wait_for("handling", attempt=2)["deliveries"] == 1


@pytest.mark.parametrize(
    ("most", "deliveries", "suspect"),
    [(20, 10, False), (20, 11, True), (3, 1, False), (3, 2, True), (1, 1, False), (0, 999, False)],
)
async def test_above_half_of_the_limit_a_message_is_suspect(
    most: int, deliveries: int, suspect: bool
) -> None:
    settings = ConsumerSettings.model_validate(
        {"broker_url": "sqlite:///q", "max_deliveries": most}
    )
    assert Suspects(settings).may_kill(Message(b"", deliveries=deliveries)) is suspect


@pytest.mark.slow
def test_the_termination_message_names_what_was_in_flight_when_the_process_was_killed(
    scene: Scene, tmp_path: Path
) -> None:
    scene_needs(scene, "counts_crashes")
    scene.publish(1, seconds=4)
    file = tmp_path / "termination-log"
    file.touch()
    url = scene.broker.impatient_url
    for text in ("", "ended while it handled {id} (work, delivery 2)"):
        process = scene.start(url=url, TERMINATION_MESSAGE_PATH=file)
        id = process.wait_for("handling")["message_id"]
        process.stop(signal.SIGKILL)
        assert file.read_text() == text.format(id=id)
    process = scene.start(url=url, TERMINATION_MESSAGE_PATH=file)
    process.wait_for("handling")
    assert file.read_text() == f"ended while it handled {id} (work, delivery 3)"
    wait_until(lambda: file.read_text() == "")  # the message is settled
    assert_clean_shutdown(process)


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["sqlite"], indirect=True, scope="session")
def test_at_debug_the_log_says_which_handler_begins_on_which_message(scene: Scene) -> None:
    scene.publish(1, end="exit")
    process = scene.start(log_level="debug")
    assert process.wait() == 137
    begun = process.find("handling", handler="work")
    assert [event["message_id"] for event in begun] == [begun[0]["message_id"]]
