"""One random round: carries out a plan on real processes, their network and their broker."""

import heapq
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from tools.chaos.plan import CONCURRENCY, SLOTS, Event, Plan
from tools.chaos.running import GENTLE_DRAIN_SECONDS, ROUGH_DRAIN_SECONDS, SLACK_SECONDS, Running
from tools.chaos.testbed import Experiment, Publisher, Queue, ending

PAIR_SECONDS = 0.4
TICK_SECONDS = 0.02


class Round(Experiment):
    """Carries out a plan. ``log`` has each step, with its time."""

    def __init__(self, queue: Queue, plan: Plan) -> None:
        super().__init__(queue)
        self.testbed = queue.testbed
        self.plan = plan
        self.reconciliation.graceful = plan.gentle
        self.log: list[str] = []
        self._drain_seconds = GENTLE_DRAIN_SECONDS if plan.gentle else ROUGH_DRAIN_SECONDS
        self._running: list[Running] = []
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._began_at = 0.0
        self._full = True
        self._faults: dict[str, int] = {}

    def run(self) -> None:
        publisher = Publisher(self.queue)
        self._began_at = time.monotonic()
        for slot in range(SLOTS):
            self._start(slot)
        for event in self.plan.events:
            self._at(event.at_seconds, partial(self._do, event, publisher))
        while self._later:
            self._tick()
        self._full = False  # from now on, an ended process is not replaced
        publisher.finish()
        for running in self._running:
            running.signal(signal.SIGTERM)
            self.stops += 1
        while self._running:
            self._tick()
        self.queue.rest(self.reconciliation)
        self.queue.finish(self.reconciliation, SLOTS + 1 if self.testbed.broker == "mqtt" else 1)

    def text(self) -> str:
        return self.plan.text() + "".join(f"{line}\n" for line in self.log)

    # -- time

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (self._began_at + seconds, next(self._numbers), action))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(time.monotonic() - self._began_at + seconds, action)

    def _tick(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[-1]()
        for running in list(self._running):
            self._reap(running)
        next_at = self._later[0][0] if self._later else time.monotonic() + TICK_SECONDS
        time.sleep(min(TICK_SECONDS, max(0, next_at - time.monotonic())))

    def _note(self, what: str, **details: Any) -> None:
        self.log.append(str(Event(time.monotonic() - self._began_at, what, details)))

    # -- processes

    def _start(self, slot: int) -> None:
        process = self.queue.start(
            impatient=not self.plan.gentle,
            proxy=slot,
            concurrency=CONCURRENCY,
            drain_seconds=self._drain_seconds,
            max_attempts=3,
        )
        self._running.append(Running(process, slot, self._drain_seconds))
        self._note("started", process=process.name, slot=slot, pid=process.pid)

    def _reap(self, running: Running) -> None:
        now = time.monotonic()
        overdue = running.must_end_by is not None and now > running.must_end_by
        exit_code = running.process.child.poll()
        if exit_code is None and not overdue:
            return
        if exit_code is None:
            running.process.send(signal.SIGKILL)
        exit_code = running.process.wait()
        began = running.first_signal_at or now
        bound = (running.must_end_by or now) - began
        seconds = now - began + (SLACK_SECONDS if overdue else 0)
        self.reconciliation.endings.append(
            ending(running.process, exit_code, running.allowed, seconds, max(bound, 1))
        )
        self._note("ended", process=running.process.name, exit_code=exit_code)
        self._running.remove(running)
        if self._full and running.slot < SLOTS and not self._is_staffed(running.slot):
            self._start(running.slot)

    def _is_staffed(self, slot: int) -> bool:
        return any(running.slot == slot for running in self._running)

    def _in_slot(self, slot: int) -> Running:
        return next(running for running in self._running if running.slot == slot)

    # -- the steps of the plan

    def _do(self, event: Event, publisher: Publisher) -> None:
        details = dict(event.details)
        if event.what == "publish":
            publisher.put(details["tasks"])
            blocks = sum(task["how"] == "block" for task in details["tasks"])
            self.reconciliation.most_repeated += blocks * CONCURRENCY
            return
        self._note(event.what, **details)
        getattr(self, f"_{event.what}")(**details)

    def _disturbed(self, processes: int) -> None:
        """This many processes may have lost their in-flight messages and their last acknowledgements."""
        self.reconciliation.most_repeated += 2 * CONCURRENCY * processes

    def _stop(self, slot: int, signum: str) -> None:
        self._in_slot(slot).signal(signal.Signals[signum])
        self.stops += 1

    def _kill(self, slot: int) -> None:
        self._in_slot(slot).kill()
        self.kills += 1
        self._disturbed(1)

    def _force(self, slot: int) -> None:
        running = self._in_slot(slot)
        running.signal(signal.SIGTERM)
        self.stops += 1

        def again() -> None:
            if running in self._running:
                running.signal(signal.SIGINT)

        self._after(PAIR_SECONDS, again)
        self._disturbed(1)

    def _pause(self, slot: int, seconds: float) -> None:
        running = self._in_slot(slot)
        if running.pause():
            self._after(seconds, running.resume)
            self._disturbed(1)

    def _add(self, slot: int) -> None:
        """Add a process on the same proxy, which is not replaced when it ends."""
        if len(self._running) <= SLOTS:
            self._start(SLOTS + slot)

    def _clock(self, slot: int, by: float) -> None:
        self._in_slot(slot).process.clock.write_text(str(by))
        self._disturbed(SLOTS)

    def _for_a_while(
        self, fault: str, seconds: float, begin: Callable[[], None], end: Callable[[], None]
    ) -> None:
        """Faults of one kind may overlap: the last one ends them."""
        self._faults[fault] = self._faults.get(fault, 0) + 1
        begin()
        self._disturbed(SLOTS + 1)

        def finish() -> None:
            self._faults[fault] -= 1
            if not self._faults[fault]:
                self._note("over", fault=fault)
                end()

        self._after(seconds, finish)

    def _cut(self, proxy: int) -> None:
        self.testbed.proxy(proxy).cut()
        self._disturbed(SLOTS + 1)

    def _black_hole(self, proxy: int, seconds: float) -> None:
        chosen = self.testbed.proxy(proxy)
        self._for_a_while(f"proxy {chosen.port}", seconds, chosen.black_hole, chosen.resume)

    def _refuse(self, proxy: int, seconds: float) -> None:
        chosen = self.testbed.proxy(proxy)
        self._for_a_while(f"proxy {chosen.port}", seconds, chosen.refuse, chosen.resume)

    def _throttle(self, proxy: int, seconds: float, bytes_per_second: int) -> None:
        chosen = self.testbed.proxy(proxy)

        def set_to(rate: float | None) -> None:
            chosen.bytes_per_second = rate

        self._for_a_while(
            f"rate {chosen.port}", seconds, lambda: set_to(bytes_per_second), lambda: set_to(None)
        )

    def _broker_kill(self, seconds: float) -> None:
        server = self.testbed.server
        self._for_a_while("broker", seconds, server.kill, server.restart)
        if self.testbed.broker == "mqtt":  # it starts again from a snapshot
            self.reconciliation.most_repeated = float("inf")

    def _disk_full(self, seconds: float) -> None:
        self._for_a_while("disk", seconds, self.testbed.disk.fill, self.testbed.disk.free)
