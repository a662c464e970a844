# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""For the tests of handlers: messages through the consumer's own code, without a broker."""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, cast

from pydantic import SecretStr

from .brokers.buffer import Buffer
from .brokers.source import Capabilities, Source
from .cancellation import CancellationEvent
from .consumer import Consumer, Lifespan
from .formats import Decoder
from .handlers import Around, HandlerFunction, Router
from .message import Message, OutgoingMessage
from .settings import ConsumerSettings
from .suspects import Suspects


@dataclass(frozen=True)
class Delivered:
    """The outcome of a message."""

    outcome: Literal["handled", "retried", "rejected"]
    reason: str = ""
    """The reason of a retry or a dead letter."""
    retry_seconds: float | None = None
    """The delay of a retry; 0 for a message that a shutdown requeues."""
    published: tuple[OutgoingMessage, ...] = ()
    """The published messages; in a batch, of all its messages."""


class Options(TypedDict, total=False):
    given: Any
    """Replaces what ``lifespan`` yields."""
    lifespan: Lifespan | None
    """Opened before the call, and closed afterwards."""
    stopping: bool
    """Whether the service is shutting down."""
    around: Around | None
    decoders: Mapping[str, Decoder] | None


async def deliver(handler: HandlerFunction, body: Any, **options: Unpack[Options]) -> Delivered:
    """Deliver one message to the handler, for a batch handler as a batch of one.

    The body is bytes, a `Message`, or what becomes JSON. The settings are the service's, from the environment.
    """
    [delivered] = await deliver_batch(handler, [body], **options)
    return delivered


async def deliver_batch(
    handler: HandlerFunction, bodies: Sequence[Any], **options: Unpack[Options]
) -> list[Delivered]:
    """Like `deliver`, with all messages in one batch."""
    settings = ConsumerSettings(
        broker_url=SecretStr("test:"),
        broker_url_file="",
        batch_size=len(bodies),
        batch_seconds=0.1,
        breaker_failures=0,
    )
    router = Router({"test": handler}, options.get("decoders"), options.get("around"))
    messages = [
        replace(body, published_count=0)
        if isinstance(body, Message)
        else Message(OutgoingMessage(body).body, f"m-{number}")
        for number, body in enumerate(bodies, 1)
    ]
    lifespan, settlements = options.get("lifespan"), Settlements(settings)
    async with lifespan() if lifespan else nullcontext(options.get("given")) as given:
        router.give(given)
        await settlements.handle(router, messages, stopping=options.get("stopping", False))
    published = tuple(settlements.published)
    return [replace(settlements.settled[message], published=published) for message in messages]


class Settlements:
    """Replaces a source: records how each message was settled, and the published messages."""

    capabilities = Capabilities()
    longest_hold_seconds = math.inf
    stopped = False
    in_flight: Any = ()
    parts: Sequence[Any] = ()

    def __init__(self, settings: ConsumerSettings) -> None:
        self.settings, self.suspects, self.buffer = settings, Suspects(settings), Buffer()
        self.settled: dict[Message, Delivered] = {}
        self.published: list[OutgoingMessage] = []

    async def handle(
        self,
        router: Router,
        messages: Iterable[Message],
        *,
        stopping: bool = False,
        alone: bool = False,
    ) -> None:
        """Handle by a consumer; with ``alone``, a batch handler gets each message in its own batch."""
        event, source = CancellationEvent(asyncio.get_running_loop()), cast("Source", self)
        consumer = Consumer(source, router, event, self.settings)
        self._breaker = consumer.breaker
        consumer._cancelling_handlers = alone  # only the person who ends the trial cancels
        try:
            if stopping:
                event.set("test")
                consumer._fetching_stopped.set()
            call = consumer.limits.calls_of(asyncio.current_task())
            for message in messages:
                handling = consumer._begin(message, call, alone=alone)
                if handling is not None:
                    await handling
            await asyncio.gather(*consumer._tasks)
        finally:
            consumer._threads.shutdown(wait=False, cancel_futures=True)

    async def ack(self, message: Message) -> None:
        self.settled[message] = Delivered("handled")

    async def retry(self, message: Message, delay_seconds: float, reason: str) -> None:
        self.settled[message] = Delivered("retried", reason, delay_seconds)

    async def reject(self, message: Message, reason: str) -> None:
        self.settled[message] = Delivered("rejected", reason)

    async def requeue(self, message: Message) -> None:
        self.settled[message] = Delivered("retried", "requeued", 0.0)

    def put_back(self, message: Message) -> None:
        reason = f"Pause: {self._breaker.reason}"
        self.settled[message] = Delivered("retried", reason, self._breaker.seconds)

    async def publish(self, messages: Sequence[OutgoingMessage]) -> None:
        self.published += messages

    async def publish_and_ack(self, message: Message, messages: Sequence[OutgoingMessage]) -> None:
        await self.publish(messages)
        await self.ack(message)
