"""The metrics: a scrape equals the ledger, under the names that dashboards rely on."""

import asyncio
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from harness.contract import opened
from harness.process import ask
from harness.scene import Scene, wait_until
from harness.servers import Server, ServerMissing, skip_without_server
from harness.servers.local import free_port
from runtime.brokers import make_source
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.handlers import HandlerFunction, Router
from runtime.message import Message, OutgoingMessage, Reject, Retry
from runtime.settings import BUCKETS_SECONDS, TEMPLATE_VERSION, ConsumerSettings
from runtime.telemetry import MOST_VALUES, OTHER, Telemetry, make_telemetry
from runtime.telemetry.prometheus import (
    PrometheusTelemetry,
)

pytestmark = pytest.mark.parametrize("broker", ["sqlite"], indirect=True)

NAMES = {
    "consumer_messages_total": {"handler", "outcome"},
    "consumer_failures_total": {"handler", "error"},
    "consumer_message_duration_seconds_bucket": {"handler", "le"},
    "consumer_message_duration_seconds_count": {"handler"},
    "consumer_message_duration_seconds_sum": {"handler"},
    "consumer_message_queue_seconds_bucket": {"le"},
    "consumer_message_queue_seconds_count": set(),
    "consumer_message_queue_seconds_sum": set(),
    "consumer_messages_in_flight": set(),
    "consumer_paused": set(),
    "consumer_oldest_in_flight_seconds": set(),
    "consumer_concurrency": set(),
    "consumer_event_loop_lag_seconds": set(),
    "consumer_build_info": {"version", "template", "broker"},
    "consumer_state": {"state"},
    "consumer_last_message_timestamp_seconds": set(),
    "consumer_broker_connected": set(),
    "consumer_reconnects_total": set(),
    "consumer_shutdown_duration_seconds": set(),
    "consumer_messages_abandoned_total": set(),
    "consumer_messages_requeued_total": set(),
}
"""Each metric with its labels. Dashboards depend on these: none may be removed or renamed."""


class Page:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [sample for family in parse(text) for sample in family.samples]

    @classmethod
    def of(cls, telemetry: PrometheusTelemetry) -> "Page":
        return cls(telemetry.scrape("")[0].decode())

    def value(self, name: str, **labels: str) -> float:
        [value] = [s.value for s in self.samples if s.name == name and s.labels == labels]
        return value

    @property
    def outcomes(self) -> dict[tuple[str, str], int]:
        """The messages by handler and outcome, without zeros."""
        return {
            (s.labels["handler"], s.labels["outcome"]): int(s.value)
            for s in self.samples
            if s.name == "consumer_messages_total" and s.value
        }

    @property
    def failures(self) -> dict[tuple[str, str], int]:
        """The failures by handler and type of error."""
        return {
            (s.labels["handler"], s.labels["error"]): int(s.value)
            for s in self.samples
            if s.name == "consumer_failures_total"
        }

    @property
    def state(self) -> str:
        [state] = [
            s.labels["state"] for s in self.samples if s.name == "consumer_state" and s.value == 1
        ]
        return state


@pytest.mark.slow
def test_after_a_known_run_the_metrics_equal_the_ledger(scene: Scene) -> None:
    port = free_port()
    process = scene.start(
        HANDLERS="work,thread",
        LIFESPAN_FAILS="hang",
        CLOSE_SECONDS=2,
        probe_port=port,
        drain_seconds=0.5,
    )
    scene.publish(5, seconds=0.01)
    scene.publish(2, kind="thread")
    scene.publish(3, end="retry", retry_after_seconds=3600)
    scene.publish(1, end="reject")
    scene.publish_bodies([b"not JSON"], kind="work")
    scene.publish_bodies([b"{}"], kind="unheard-of")
    wait_until(lambda: len(scene.ledger.ended) == 11)
    wait_until(lambda: scene.broker.counts(scene.queue).dead == 3)
    scene.publish(1, seconds=60)
    process.wait_for("handling", count=12)
    oldest_at = time.monotonic()
    wait_until(lambda: Page(ask(port, "/metrics")[1]).value("consumer_event_loop_lag_seconds") > 0)
    scene.publish(1, seconds=60)
    process.wait_for("handling", count=13)
    oldest_seconds = time.monotonic() - oldest_at
    page = Page(ask(port, "/metrics")[1])
    assert page.outcomes == {
        ("work", "handled"): 5,
        ("thread", "handled"): 2,
        ("work", "retried"): 3,
        ("work", "rejected"): 2,
        ("none", "rejected"): 1,
    }
    assert page.value("consumer_message_duration_seconds_count", handler="work") == 9
    assert 0.05 <= page.value("consumer_message_duration_seconds_sum", handler="work") < 10
    assert page.value("consumer_message_duration_seconds_count", handler="thread") == 2
    assert page.value("consumer_message_queue_seconds_count") == 13
    assert 0 <= page.value("consumer_message_queue_seconds_sum") < 13 * 20
    assert page.failures == {("work", "Reject"): 2, ("none", "Reject"): 1}
    assert page.value("consumer_messages_in_flight") == 2
    assert oldest_seconds <= page.value("consumer_oldest_in_flight_seconds") < 60
    assert page.value("consumer_concurrency") == 10
    assert 0 < page.value("consumer_event_loop_lag_seconds") < 20
    build = {"version": "unknown", "template": TEMPLATE_VERSION, "broker": "sqlite"}
    assert page.value("consumer_build_info", **build) == 1
    [starting] = process.find("starting")
    assert starting["telemetry"] == "prometheus"
    assert build.items() <= starting.items()
    assert page.state == "consuming"
    assert page.value("consumer_shutdown_duration_seconds") == 0

    process.send(signal.SIGTERM)
    process.wait_for("drained")  # the lifespan is closing now
    page = Page(ask(port, "/metrics")[1])
    assert page.outcomes["work", "abandoned"] == 2
    assert page.value("consumer_messages_abandoned_total") == 2
    assert page.value("consumer_messages_in_flight") == 0
    assert page.state == "draining"
    assert 0.5 <= page.value("consumer_shutdown_duration_seconds") < 5
    assert process.wait() == 75


Run = Callable[..., Any]


@pytest.fixture
async def run(settings_for: Callable[..., ConsumerSettings]) -> Run:
    """Consume these messages until this many are settled; returns a scrape after the shutdown."""

    async def run(
        messages: list[OutgoingMessage],
        handlers: dict[str, HandlerFunction],
        until: Callable[[Page], bool],
        **settings: Any,
    ) -> Page:
        made = settings_for(**settings)
        event = CancellationEvent(asyncio.get_running_loop())
        telemetry = PrometheusTelemetry(CollectorRegistry())
        consumer = Consumer(make_source(made, 10), Router(handlers), event, made, None, telemetry)
        async with opened(make_source(made)) as publisher:
            await publisher.publish(messages)
        consuming = asyncio.create_task(consumer.run())
        async with asyncio.timeout(20):
            while not until(Page.of(telemetry)) and not consuming.done():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        event.set("test")
        await consuming
        return Page.of(telemetry)

    return run


async def test_names_and_labels_are_those_that_others_rely_on(run: Run) -> None:
    async def handle(body: bytes) -> None:
        raise Reject("no")

    page = await run([OutgoingMessage(b"")], {"n": handle}, lambda page: bool(page.outcomes))
    assert {sample.name: set(sample.labels) for sample in page.samples} == NAMES


async def test_labels_are_bounded_whatever_messages_come(run: Run) -> None:
    async def handle(body: bytes) -> None: ...

    messages = [OutgoingMessage(b"", f"type-{number}") for number in range(50)]
    page = await run(
        messages,
        {"one": handle, "two": handle},
        lambda page: page.outcomes.get(("none", "rejected")) == 50,
    )
    labels = Counter(sample.name for sample in page.samples)
    assert labels["consumer_messages_total"] == 2 * 4 + 2


async def test_types_of_errors_are_bounded(run: Run) -> None:
    """Also for a handler that creates a class for each message."""

    async def handle(body: bytes) -> None:
        raise type(body.decode(), (Reject,), {})

    messages = [OutgoingMessage(b"Error%d" % number) for number in range(MOST_VALUES + 10)]
    page = await run(
        messages,
        {"n": handle},
        lambda page: page.outcomes.get(("n", "rejected")) == len(messages),
        max_attempts=1,
    )
    assert page.failures["n", OTHER] == 10
    assert Counter(page.failures.values()) == {1: MOST_VALUES, 10: 1}


async def test_the_last_message_has_no_time_before_the_first(run: Run) -> None:
    """An alert on its age would fire for each new process."""

    async def handle(body: bytes) -> None: ...

    page = await run([], {"n": handle}, lambda page: page.state == "consuming")
    name = "consumer_last_message_timestamp_seconds"
    assert name not in {sample.name for sample in page.samples}
    page = await run([OutgoingMessage(b"")], {"n": handle}, lambda page: bool(page.outcomes))
    assert abs(page.value(name) - time.time()) < 20


async def test_a_retry_is_not_in_the_time_in_the_queue(run: Run) -> None:
    """The wait of a retry is planned."""

    async def handle(body: bytes, message: Message) -> None:
        if message.attempt == 1:
            raise RuntimeError

    page = await run(
        [OutgoingMessage(b"")],
        {"n": handle},
        lambda page: page.outcomes.get(("n", "handled")) == 1,
        retry_seconds=0.01,
    )
    assert page.value("consumer_message_queue_seconds_count") == 1
    assert page.failures == {("n", "RuntimeError"): 1}


async def test_every_outcome_exists_from_the_start_as_0(run: Run) -> None:
    async def handle(body: bytes) -> None: ...

    page = await run([], {"n": handle}, lambda page: page.state == "consuming")
    for outcome in ("handled", "retried", "rejected", "abandoned"):
        assert page.value("consumer_messages_total", handler="n", outcome=outcome) == 0


async def test_each_attempt_has_one_outcome(run: Run) -> None:
    async def handle(body: bytes, message: Message) -> None:
        raise Retry("again", delay_seconds=0)

    page = await run(
        [OutgoingMessage(b"")],
        {"n": handle},
        lambda page: page.outcomes.get(("n", "rejected")) == 1,
        max_attempts=4,
    )
    assert page.outcomes == {("n", "retried"): 3, ("n", "rejected"): 1}
    assert page.value("consumer_message_duration_seconds_count", handler="n") == 4
    assert page.failures == {}, "a retry is planned"


async def test_a_batch_is_one_duration_and_as_many_outcomes_as_messages(run: Run) -> None:
    async def handle(bodies: list[bytes]) -> None: ...

    page = await run(
        [OutgoingMessage(b"") for _ in range(6)],
        {"n": handle},
        lambda page: page.outcomes.get(("n", "handled")) == 6,
        batch_size=3,
    )
    assert page.value("consumer_message_duration_seconds_count", handler="n") == 2


async def test_durations_fall_into_their_buckets(run: Run) -> None:
    async def handle(body: bytes) -> None:
        await asyncio.sleep(0.03)

    page = await run([OutgoingMessage(b"")], {"n": handle}, lambda page: bool(page.outcomes))
    name = "consumer_message_duration_seconds_bucket"
    assert page.value(name, handler="n", le="0.025") == 0
    assert page.value(name, handler="n", le="600.0") == 1
    assert page.value(name, handler="n", le="+Inf") == 1


async def test_the_buckets_can_be_set(run: Run) -> None:
    async def handle(body: bytes) -> None: ...

    page = await run([], {"n": handle}, lambda _: True, duration_buckets=(900, 0.5))
    for name in ("duration", "queue"):
        bounds = [
            sample.labels["le"]
            for sample in page.samples
            if sample.name == f"consumer_message_{name}_seconds_bucket"
        ]
        assert bounds == ["0.5", "900.0", "+Inf"]
    assert (BUCKETS_SECONDS[0], BUCKETS_SECONDS[-1]) == (0.001, 600)  # the default


def test_the_services_own_metrics_are_on_the_page_and_openmetrics_is_spoken(
    broker: Server,
) -> None:
    registry = CollectorRegistry()
    telemetry = PrometheusTelemetry(registry)
    prometheus_client.Counter("orders", "Orders.", registry=registry).inc(3)
    body, content_type = telemetry.scrape("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]  # it has no types
    assert "orders" in {family.name for family in families}


def test_without_a_probe_port_no_metrics_are_collected(
    settings_for: Callable[..., ConsumerSettings],
) -> None:
    assert type(make_telemetry("orders", settings_for(probe_port=0))) is Telemetry


async def test_promtool_finds_nothing_to_criticize(run: Run) -> None:
    if shutil.which("promtool") is None:
        skip_without_server(ServerMissing("promtool is not installed: apt-get install prometheus"))

    async def handle(body: bytes) -> None:
        raise Reject("no")

    page = await run([OutgoingMessage(b"")], {"n": handle}, lambda page: bool(page.outcomes))
    checked = subprocess.run(  # noqa: ASYNC221  # nothing else runs meanwhile
        ["promtool", "check", "metrics"],
        input=page.text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout) == (0, "")
