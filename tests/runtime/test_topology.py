"""The existing topology is used unchanged, and commands create only what was requested."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aio_pika
import pytest

from harness.contract import eventually, opened, take
from harness.servers import Server
from rabbitmq_client import open_channel
from rabbitmqctl import control_of
from runtime.brokers import make_source
from runtime.brokers.source import MISSING, Broker
from runtime.errors import BrokerDenied, BrokerRefused
from runtime.settings import ConsumerSettings
from secured import with_user
from steps import publish

SettingsFor = Callable[..., ConsumerSettings]

rabbitmq = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True, scope="session")


MAY_HAVE_ALL = {"mqtt", "postgres", "sqlite"}
"""On MQTT a topic is a name, and so is a source in a database, whose tables these tests share."""


async def look(settings: ConsumerSettings) -> dict[str, int | str]:
    async with make_source(settings) as source:
        return await source.describe()


async def test_without_the_right_to_declare_what_is_missing_is_one_sentence_and_stays_missing(
    settings_for: SettingsFor, queue: str
) -> None:
    settings = settings_for(declare="no")
    async with make_source(settings) as source:
        missing = {name for name, value in (await source.describe()).items() if value == MISSING}
        if not missing:
            pytest.skip("on this broker there is nothing to make")
        with pytest.raises(BrokerRefused, match=f"{queue}.* {MISSING}: run `declare`") as refusal:
            await source.prepare()
        assert all(name in str(refusal.value) for name in missing)
    described = await look(settings)
    assert {name for name, value in described.items() if value == MISSING} == missing


async def test_looking_makes_and_changes_nothing_although_the_service_may(
    settings_for: SettingsFor, broker_name: str
) -> None:
    """The commands `check` and ``dead-letters`` do this."""
    settings = settings_for()
    before = await look(settings)
    if broker_name not in MAY_HAVE_ALL:
        assert MISSING in before.values()
    async with make_source(settings) as source:
        if source.capabilities.dead_letters:
            assert await source.count_dead_letters() == 0
            assert [letter async for letter in source.dead_letters(9)] == []
            assert [moved async for moved in source.replay_dead_letters()] in ([], [0])
            assert [gone async for gone in source.purge_dead_letters()] in ([], [0])
    assert await look(settings) == before


async def test_what_declare_made_serves_a_service_that_may_not(settings_for: SettingsFor) -> None:
    settings = settings_for(declare="no", retry_seconds=0.1, retry_max_seconds=0.4)
    async with make_source(settings) as owner:
        await owner.declare()
        before = {*await owner.describe()}
    async with make_source(settings, 5) as source:
        await source.prepare()
        await source.start()
        await publish(source, 1)
        (message,) = await take(source, 1)
        await source.retry(message, 0.1, "not now")
        (message,) = await take(source, 1)
        assert message.attempt == (2 if source.capabilities.attempts else 1)
        await source.reject(message, "bad")
        await source.stop()
    assert {*await look(settings)} == before


async def test_bindings_are_refused_by_a_broker_without(
    settings_for: SettingsFor, broker_name: str
) -> None:
    if broker_name == "rabbitmq":
        pytest.skip("it has bindings")
    with pytest.raises(BrokerRefused, match="CONSUMER_BINDINGS: this broker has no bindings"):
        make_source(settings_for(bindings="orders/order.created"))


@pytest.mark.parametrize("place", ["routing-key", "subject", "topic"])
async def test_a_place_of_the_type_that_the_broker_lacks_is_one_sentence(
    settings_for: SettingsFor, place: str
) -> None:
    settings = settings_for(type_from=place)
    if place in type(make_source(settings_for())).origins:
        make_source(settings)
        return
    with pytest.raises(BrokerRefused, match=f"CONSUMER_TYPE_FROM: this broker has no {place}"):
        make_source(settings)


# -- RabbitMQ


@pytest.fixture
async def exchange(broker: Server, queue: str) -> AsyncIterator[Any]:
    """A topic exchange of another team."""
    async with open_channel(broker.url) as channel:
        exchange = await channel.declare_exchange(f"{queue}-events", "topic", durable=True)
        yield exchange
        await exchange.delete()


@rabbitmq
@pytest.mark.parametrize(
    "arguments",
    [{}, {"x-max-priority": 5}, {"x-single-active-consumer": True}, {"x-queue-mode": "lazy"}],
    ids=["classic", "priorities", "single active consumer", "lazy"],
)
async def test_an_existing_queue_is_consumed_as_it_is(
    settings_for: SettingsFor, broker: Server, queue: str, arguments: dict[str, Any]
) -> None:
    settings = settings_for(retry_seconds=0.1, retry_max_seconds=0.4)
    async with open_channel(broker.url) as channel:
        existing = await channel.declare_queue(queue, durable=True, arguments=arguments)
        async with opened(make_source(settings, 5)) as source:
            published = await publish(source, 2)
            await source.start()
            first, second = await take(source, 2)
            await source.ack(first)
            await source.retry(second, 0.1, "not now")
            (again,) = await take(source, 1)
            assert (again.id, again.attempt) == (published[1], 2)
            await source.reject(again, "bad")
            assert [letter.id async for letter in source.dead_letters(2)] == [published[1]]
            await source.stop()
        redeclared = await channel.declare_queue(queue, durable=True, arguments=arguments)
        assert (redeclared.name, redeclared.declaration_result.message_count) == (existing.name, 0)


@rabbitmq
async def test_shutdowns_do_not_reach_the_delivery_limit_of_an_existing_queue_that_is_half_of_ours(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    """If requeues count, the queue would drop the messages: it has no dead letters."""
    arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": 2}
    async with open_channel(broker.url) as channel:
        await channel.declare_queue(queue, durable=True, arguments=arguments)
    settings = settings_for(max_deliveries=4)
    async with opened(make_source(settings)) as source:
        await publish(source, 3)
    for _ in range(4):
        async with opened(make_source(settings, 5)) as source:
            await source.start()
            async with asyncio.timeout(10):
                while len(source.unacked) < 3:  # noqa: ASYNC110  # nothing tells
                    await asyncio.sleep(0.01)
            await source.stop()
    assert (await look(settings))[queue] == 3


@rabbitmq
async def test_a_service_makes_two_queues_and_a_retry_queue_when_it_needs_one(
    settings_for: SettingsFor, broker: Server, queue: str
) -> None:
    settings = settings_for(retry_seconds=0.1, retry_max_seconds=60)

    async def exist() -> list[str]:
        names = [queue, f"{queue}.dead", *(f"{queue}.retry.{ms}" for ms in (100, 200, 400))]
        async with make_source(settings) as source:
            return [name for name in names if await source._count(name) is not None]  # type: ignore[attr-defined]

    async with make_source(settings, 5) as source:
        await source.prepare()
        await source.start()
        await publish(source, 1)
        (message,) = await take(source, 1)
        assert await exist() == [queue, f"{queue}.dead"]
        await source.retry(message, 0.1, "not now")
        assert await exist() == [queue, f"{queue}.dead", f"{queue}.retry.100"]
        await take(source, 1)
        await source.stop()


@rabbitmq
async def test_bindings_bring_other_programs_messages_and_come_back_with_the_queue(
    settings_for: SettingsFor, broker: Server, queue: str, exchange: Any
) -> None:
    keys = f"{exchange.name}/order.*,{exchange.name}/refund.#"
    settings = settings_for(bindings=keys, type_from="routing-key")
    async with opened(make_source(settings, 5)) as source:
        await source.start()
        for key in ("order.created", "refund.a.b", "other"):
            await publish_through(exchange, key)
        messages = await take(source, 2)
        assert sorted(message.type for message in messages) == ["order.created", "refund.a.b"]
        assert messages[0].origin == {
            "exchange": exchange.name,
            "routing_key": "order.created",
            "source": queue,
        }
        for message in messages:
            await source.ack(message)
        async with open_channel(broker.url) as channel:
            await channel.queue_delete(queue)
        await until_bound(source, exchange)
        await source.stop()


@pytest.mark.slow
async def test_bindings_need_just_the_rights_that_the_page_names(start_server: Any) -> None:
    """The rights to configure, to write and to read; then without each of the two that only bindings need."""
    node = start_server("private", "rabbitmq")
    control, queue, user = control_of(node), "orders", "user-of-bindings"
    settings = ConsumerSettings.model_validate(
        {
            "broker_url": with_user(node.url, user, "secret"),
            "source": queue,
            "bindings": "events/#",
            "type_from": "routing-key",
        }
    )
    write, read = r"amq\.default|orders", "orders|events"
    control("add_user", user, "secret")
    async with open_channel(node.url) as channel:
        exchange = await channel.declare_exchange("events", "topic", durable=True)
        for name in (queue, f"{queue}.dead"):
            await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
        control("set_permissions", user, "", rf"^({write})$", rf"^({read})$")
        async with make_source(settings, 5) as source:
            await source.prepare()
            await source.start()
            await publish_through(exchange, "order.created")
            [message] = await take(source, 1)
            await source.ack(message)
            await source.stop()
        for rights in (
            ["", r"^amq\.default$", rf"^({read})$"],
            ["", rf"^({write})$", rf"^{queue}$"],
        ):
            control("set_permissions", user, *rights)
            async with make_source(settings, 5) as source:
                with pytest.raises(BrokerDenied, match="ACCESS_REFUSED"):
                    await source.prepare()
        await exchange.delete()
    node.delete(queue)
    control("delete_user", user)


async def publish_through(exchange: Any, routing_key: str) -> None:
    await exchange.publish(aio_pika.Message(b"{}"), routing_key)


async def until_bound(source: Broker, exchange: Any) -> None:
    """Publish until a message arrives: the queue is created again, with its bindings."""
    async with asyncio.timeout(20):
        coming = asyncio.create_task(take(source, 1))
        while not coming.done():
            await publish_through(exchange, "order.created")
            await asyncio.wait({coming}, timeout=0.2)
        [message] = await coming
    assert message.type == "order.created"


@rabbitmq
async def test_the_type_from_the_routing_key_survives_a_retry_and_a_replay(
    settings_for: SettingsFor, exchange: Any
) -> None:
    settings = settings_for(
        bindings=f"{exchange.name}/#",
        type_from="routing-key",
        retry_seconds=0.1,
        retry_max_seconds=0.4,
    )
    async with opened(make_source(settings, 5)) as source:
        await source.start()
        await publish_through(exchange, "order.created")
        (message,) = await take(source, 1)
        await source.retry(message, 0.1, "not now")
        (again,) = await take(source, 1)
        assert (again.type, again.origin) == ("order.created", message.origin)
        await source.reject(again, "bad")
        [letter] = [letter async for letter in source.dead_letters(2)]
        assert (letter.type, letter.origin["routing_key"]) == ("order.created", "order.created")
        await eventually(1, source.count_dead_letters)  # when the message is in the queue again
        assert [moved async for moved in source.replay_dead_letters()] == [1]
        (replayed,) = await take(source, 1)
        assert (replayed.type, replayed.origin) == ("order.created", message.origin)
        await source.ack(replayed)
        await source.stop()


DEAD_LETTERED_BY_THE_BROKER: dict[str, dict[str, Any]] = {
    "expired": {"x-queue-type": "quorum"},
    "maxlen": {"x-max-length": 1, "x-overflow": "drop-head"},
    "delivery_limit": {"x-queue-type": "quorum", "x-delivery-limit": 1},
    "rejected": {},
}
"""The arguments of an existing queue, by the reason of the dead letter."""


@rabbitmq
@pytest.mark.parametrize("type_from", ["routing-key", ""], ids=["routing key", "type"])
@pytest.mark.parametrize("reason", DEAD_LETTERED_BY_THE_BROKER)
async def test_what_the_broker_itself_dead_lettered_has_its_type_and_its_routing_key_after_a_replay(
    settings_for: SettingsFor,
    broker: Server,
    queue: str,
    exchange: Any,
    reason: str,
    type_from: str,
) -> None:
    settings = settings_for(bindings=f"{exchange.name}/#", type_from=type_from)
    arguments = {**DEAD_LETTERED_BY_THE_BROKER[reason], "x-dead-letter-exchange": ""}
    arguments["x-dead-letter-routing-key"] = f"{queue}.dead"
    async with open_channel(broker.url) as channel:
        existing = await channel.declare_queue(queue, durable=True, arguments=arguments)
        async with opened(make_source(settings, 5)) as source:
            await exchange.publish(
                aio_pika.Message(
                    b"{}",
                    message_id="one",
                    type=None if type_from else "order.created",
                    expiration=0.001 if reason == "expired" else None,
                ),
                "order.created",
            )
            if reason == "maxlen":
                await exchange.publish(aio_pika.Message(b"{}"), "order.paid")
            elif reason != "expired":
                while (delivered := await existing.get(fail=False)) is not None:
                    await delivered.nack(requeue=reason == "delivery_limit")
            await eventually(1, source.count_dead_letters)
            await existing.purge()
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert letter.reason == f"dead-lettered by the broker: {reason}"
            wanted = {"exchange": exchange.name, "routing_key": "order.created"}
            assert (letter.type, letter.origin) == ("order.created", wanted)
            assert [moved async for moved in source.replay_dead_letters()] == [1]
            await source.start()
            (replayed,) = await take(source, 1)
            assert (replayed.id, replayed.type, replayed.attempt) == ("one", "order.created", 1)
            assert replayed.origin == {**wanted, "source": queue}
            await source.retry(replayed, 0.1, "not now")
            (again,) = await take(source, 1)
            assert (again.type, again.origin) == ("order.created", replayed.origin)
            await source.ack(again)
            await source.stop()


@rabbitmq
async def test_what_comes_back_by_the_retry_queue_of_its_team_has_its_routing_key(
    settings_for: SettingsFor, broker: Server, queue: str, exchange: Any
) -> None:
    """Dead-lettered from the queue to a queue in which it waits, and from there to the first queue."""

    def dead_letter_to(name: str) -> dict[str, Any]:
        return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name}

    wait = f"{queue}.wait"
    async with open_channel(broker.url) as channel:
        existing = await channel.declare_queue(queue, arguments=dead_letter_to(wait))
        await channel.declare_queue(wait, arguments={"x-message-ttl": 1, **dead_letter_to(queue)})
        settings = settings_for(bindings=f"{exchange.name}/#", type_from="routing-key")
        async with opened(make_source(settings, 5)) as source:
            await publish_through(exchange, "order.created")
            for _ in range(2):
                delivered = await until_delivered(existing)
                await delivered.nack(requeue=False)
            await source.start()
            [message] = await take(source, 1)
            assert (message.type, message.origin["exchange"]) == ("order.created", exchange.name)
            await source.ack(message)
            await source.stop()
        await channel.queue_delete(wait)


async def until_delivered(queue: Any) -> Any:
    async with asyncio.timeout(20):
        while (delivered := await queue.get(fail=False)) is None:
            pass
    return delivered


@rabbitmq
@pytest.mark.parametrize("bindings", ["orders", "/order.created", "a/b,c"])
def test_a_binding_that_makes_no_sense_is_one_sentence(
    settings_for: SettingsFor, bindings: str
) -> None:
    with pytest.raises(BrokerRefused, match=r"CONSUMER_BINDINGS: '.*' is not exchange/routing.key"):
        make_source(settings_for(bindings=bindings))


@rabbitmq
async def test_a_binding_to_no_exchange_is_one_sentence(settings_for: SettingsFor) -> None:
    async with make_source(settings_for(bindings="nowhere/order.created")) as source:
        with pytest.raises(BrokerRefused, match="no exchange 'nowhere'"):
            await source.prepare()
