# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Publishes the messages that handlers return, and those that they send by ``message.publish``."""

from collections.abc import Iterable, Sequence
from copy import copy
from hashlib import blake2b

from .brokers.source import Source
from .errors import BrokerRefused, BrokerUnavailable
from .message import Failed, Message, OutgoingMessage
from .telemetry import Telemetry


class Publishing:
    """Publishes on the source's connection, so that some brokers can publish and acknowledge in one step."""

    def __init__(self, source: Source, group: str, telemetry: Telemetry) -> None:
        self._source = source
        self._group = group
        self._telemetry = telemetry

    async def send(
        self, message: Message, outgoing: Sequence[OutgoingMessage], *, is_result: bool = False
    ) -> None:
        """Publish a handler's messages; with ``is_result`` also acknowledge the message. Raises BrokerError."""
        outgoing = self._prepared(outgoing, [message])
        with self._telemetry.publishing(outgoing):
            await self._publish(outgoing, message if is_result else None)
        self._telemetry.count_published(outgoing)

    async def send_results(
        self, messages: Sequence[Message], outgoing: Sequence[OutgoingMessage]
    ) -> dict[Message, BaseException]:
        """Publish the results of a batch; returns the messages that failed. Raises BrokerError if all failed."""
        failures: dict[Message, BaseException] = {}
        steps = [outgoing := self._prepared(outgoing, messages)]
        with self._telemetry.publishing(outgoing):
            for step in steps:
                try:
                    await self._publish(step)
                except BrokerUnavailable:
                    raise
                except Exception as refusal:  # also for a message that cannot be encoded
                    cause = step[0].caused_by
                    if len(step) > 1:  # some may be published: try each again, with the same ids
                        steps += [[one] for one in step]
                    elif cause is None or cause not in messages:
                        raise
                    else:
                        failures[cause] = refusal
        self._telemetry.count_published([one for one in outgoing if one.caused_by not in failures])
        return failures

    async def _publish(self, outgoing: list[OutgoingMessage], of: Message | None = None) -> None:
        """With ``of`` also acknowledge this message. Adds the destinations to a refusal that does not name one."""
        try:
            await (
                self._source.publish_and_ack(of, outgoing) if of else self._source.publish(outgoing)
            )
        except BrokerRefused as refusal:
            places = sorted({one.to for one in outgoing})
            if any(place.partition(":")[2] in str(refusal) for place in places):
                raise
            msg = f"{refusal} (while publishing to {', '.join(places)})"
            raise type(refusal)(msg) from refusal.__cause__

    def _prepared(
        self, outgoing: Iterable[OutgoingMessage], messages: Sequence[Message]
    ) -> list[OutgoingMessage]:
        """Copies for publishing: a handler may send one object twice. A redelivery gives them the same ids."""
        all_ids = "\n".join(message.id for message in messages)
        prepared = [copy(one) for one in outgoing]
        for one in prepared:
            cause = one.caused_by or messages[0]
            ids = one.caused_by.id if one.caused_by else all_ids
            if not one.to:
                raise ValueError("an OutgoingMessage needs a destination: OutgoingMessage(to=...)")
            if one.has_random_id:
                place = f"{self._group}\n{ids}\n{cause.published_count}"
                one.id = blake2b(place.encode(), digest_size=16).hexdigest()
            cause.published_count += 1
            one.correlation_id = one.correlation_id or cause.correlation_id or cause.id
        return prepared


def read_results(
    result: object, batched: bool
) -> tuple[list[OutgoingMessage], dict[Message, BaseException]]:
    """Split a handler's result into messages to publish and failed messages of a batch. Raises TypeError."""
    several = isinstance(result, Iterable) and not isinstance(result, str | bytes | Failed | dict)
    results = list(result) if several and isinstance(result, Iterable) else [result]
    outgoing = [one for one in results if isinstance(one, OutgoingMessage)]
    for one in results:
        if not isinstance(one, OutgoingMessage | Failed if batched else OutgoingMessage):
            msg = f"the handler returned {type(one).__name__}: it may return OutgoingMessages, or nothing"
            raise TypeError(msg)
    return outgoing, {one.message: one.failure for one in results if isinstance(one, Failed)}
