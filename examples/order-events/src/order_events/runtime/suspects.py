# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Messages that may kill this process: they are handled one at a time, and named while they are in flight."""

import asyncio
import sys
from collections.abc import Mapping
from itertools import islice

from .logs import leave_message
from .message import Message, Reject
from .redaction import redacted
from .settings import ConsumerSettings

MOST_NAMES = 40
"""The most names in a termination message: naming thousands again and again would block the event loop."""


class Suspects:
    """Messages that are too large, or whose crashes have reached half of CONSUMER_MAX_DELIVERIES."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self.lock = asyncio.Lock()
        """Each suspect is settled before the next is handled, so the first redelivered suspect killed the process."""
        self.waiting: list[Message] = []
        """Suspects that wait, since only one worker handles suspects; `Source.stop` requeues them too."""
        self.most_bytes = settings.max_body_bytes or sys.maxsize
        self._most = settings.max_deliveries or sys.maxsize
        self.many = max(1, self._most // 2)
        """A message above either limit is a suspect; the consumer itself compares, for each message."""
        self._rejected = False

    def may_kill(self, message: Message) -> bool:
        return message.deliveries > self.many

    def is_one(self, message: Message) -> bool:
        return self.may_kill(message) or len(message.body) > self.most_bytes

    def check(self, message: Message) -> None:
        """Raises Reject for a message that is too large, or for the first with too many deliveries: others may wait."""
        if (size := len(message.body)) > self.most_bytes:
            raise Reject(f"its body has {size} bytes, above CONSUMER_MAX_BODY_BYTES")
        if (times := message.deliveries - 1) >= self._most and not self._rejected:
            self._rejected = True
            raise Reject(f"delivered {times} times without being settled: it may kill its process")


def name_in_flight(in_flight: Mapping[Message, str]) -> None:
    """Write the redelivered ones, each with its handler, to Kubernetes' termination message, also after SIGKILL."""
    again = list(islice((one for one in in_flight.items() if one[0].deliveries > 1), MOST_NAMES))
    names = (f"{redacted(m.id)[:100]} ({handler}, delivery {m.deliveries})" for m, handler in again)
    leave_message(f"ended while it handled {', '.join(names)}" if again else "")
