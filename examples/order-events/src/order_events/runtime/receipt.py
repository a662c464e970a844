# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The receipt of a shutdown counts messages by outcome: in the log event `stopped`, and Kubernetes' termination message."""

import json
import time
from collections.abc import Sequence
from signal import Signals
from typing import Any

import structlog

from .cancellation import CancellationEvent
from .consumer import Consumer
from .logs import leave_message
from .redaction import redacted
from .signals import name_of

log = structlog.get_logger()

MOST_NAMES = 20
"""The most abandoned messages in a receipt, for a termination message's size; each has an event too."""


class Receipt:
    """The receipt as far as it is known: the watchdog's thread writes it too."""

    def __init__(self, service: str, event: CancellationEvent) -> None:
        self.service, self.version = service, "unknown"
        self.consumer: Consumer | None = None
        self.why = ""
        """The failure that ends the service, if one does."""
        self._event = event

    def write(self, exit_code: int, signals: Sequence[tuple[Signals, float]] = ()) -> None:
        """``signals`` are the signals that the event has not seen yet, with their ``time.monotonic()``."""
        signals, consumer, seconds = signals or self._event.signals, self.consumer, 0.0
        by = name_of(self._event.reason) if self._event.is_set() else None
        if signals:
            by, seconds = signals[0][0].name, time.monotonic() - signals[0][1]
        in_flight = finished = requeued = 0
        abandoned: list[tuple[str, str]] = []
        if consumer is not None:
            abandoned = consumer.abandoned or [(m.id, h) for m, h in [*consumer.in_flight.items()]]
            in_flight, settled, requeued = consumer.at_signal or consumer.counts()
            _, settled_now, requeued_now = consumer.counts()
            finished, requeued = settled_now - settled, requeued_now - requeued
            if error := next(iter(consumer.errors), None):
                self.why = self.why or f"{type(error).__name__}: {error}"
        about: dict[str, Any] = {
            "service": self.service,
            "version": self.version,
            "signal": by,
            "in_flight": in_flight,
            "finished": finished,
            "requeued": requeued,
            "abandoned": [{"id": id[:100], "handler": h} for id, h in abandoned[:MOST_NAMES]],
            "abandoned_count": len(abandoned),
            "seconds": round(seconds, 3),
            "exit_code": int(exit_code),
        }
        why = redacted(self.why)[:500]
        leave_message("\n".join(filter(None, [why, json.dumps(about, ensure_ascii=False)])))
        (log.error if exit_code else log.info)("stopped", **about)
