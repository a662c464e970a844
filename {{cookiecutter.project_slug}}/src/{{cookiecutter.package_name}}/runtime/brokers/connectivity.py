# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Whether a broker can be reached, and the attempts to reach it again."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from ..cancellation import cancellable_sleep
from ..errors import BrokerRefused, BrokerUnavailable, MendableRefusal
from ..logs import Seldom
from .put_off import backoff_seconds

log = structlog.get_logger()

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0
"""The first and the longest pause between two attempts to reach a broker."""


class Connectivity:
    """Whether the broker can be reached: logs each change, and a long outage once a minute; keeps trying through it."""

    def __init__(self, address: str) -> None:
        self.address = address
        """The broker's address, without credentials."""
        self.up = False
        self.reason = ""  # of the outage
        self.outage_count = 0
        """How many times the broker was lost since the start."""
        self._failures = 0
        self._told = True  # whether the log has the outage
        self._outage: Seldom | None = None  # stays when the source itself closes the connection
        self._refusal = Seldom()  # logged apart from outages: somebody has to act

    def established(self) -> None:
        self._failures = 0
        if not self.up:
            self.up = True
            if self._told:
                log.info("connected", broker=self.address)
            self._told, self._outage = False, None

    def lost(self, reason: object) -> None:
        self.reason, refused = str(reason), isinstance(reason, BrokerRefused)
        if self.up or refused:
            self._outage = self._outage or Seldom()
        if self.up and not refused:
            self._refusal = Seldom()  # the next refusal is logged at once
        if (lost := self._outage) and (self._refusal if refused else lost).is_due():
            self._told = True
            log.warning(
                "reconnecting", broker=self.address, reason=self.reason, outage_seconds=lost.seconds
            )
        else:
            log.debug("reconnect_failed", broker=self.address, reason=self.reason)
        self.outage_count, self.up = self.outage_count + self.up, False

    async def keep(self, work: Callable[[], Awaitable[None]], until: asyncio.Event) -> None:
        """Repeat the work until the event is set; pauses grow after outages, and are the longest after refusals.

        The work calls `established` once it is connected. It is not cancelled; other exceptions pass through.
        """
        while not until.is_set():
            try:
                await work()
            except (BrokerUnavailable, MendableRefusal) as outage:
                self.lost(outage)
                self._failures += 1 if isinstance(outage, BrokerUnavailable) else 99
                pause = backoff_seconds(self._failures, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                await cancellable_sleep(pause, until)
