"""cancellation.py at every interleaving: the event loop is turned by hand, one iteration at a time.

The sweeps try every offset between two events; the state machine tries those that hypothesis generates. Both
feed the strictest source (`handoff.py`), in every way in which a source may wait.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from itertools import permutations, product
from operator import itemgetter
from typing import Any, Self

import anyio
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from handoff import SOURCES, Handoff
from runtime.cancellation import (
    cancellable_aiter,
)

Scope = Callable[["Scene"], AbstractAsyncContextManager[None]]
Action = Callable[["Scene"], None]
When = Callable[["Scene", Callable[[], None]], None]

ITERATIONS_TO_END = 30
"""More than any source here needs to end after its last event."""


@asynccontextmanager
async def no_scope(_: "Scene") -> AsyncIterator[None]:
    yield


class Scene:
    """An event loop that stands still, with one task that consumes from a handoff."""

    def __init__(self, source: str, body_iterations: int = 0, scope: Scope = no_scope) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(False)  # ten times faster; the other tests run in debug mode
        self.loop.set_exception_handler(lambda _, context: self.reported.append(context))
        self.reported: list[dict[str, Any]] = []
        self.source = source
        self.event = asyncio.Event()
        self.handoff = Handoff()
        self.put_count = 0
        self.failed = False
        self.begun: list[int] = []
        self.handled: list[int] = []
        self.begun_before_the_event = 0
        self.fire_scope: Callable[[], object] = lambda: None
        self.fired = False
        self.cancelled_outside = False
        self.lost_outside: set[int] = set()
        self.cancelling_at_end: int | None = None
        self.consumer = self.loop.create_task(
            self._consume(SOURCES[source](self.handoff), body_iterations, scope)
        )

    async def _consume(self, source: Any, body_iterations: int, scope: Scope) -> None:
        async with scope(self), aclosing(cancellable_aiter(source, self.event)) as items:
            async for item in items:
                self.begun.append(item)
                for _ in range(body_iterations):
                    await asyncio.sleep(0)
                self.handled.append(item)
        self.fire_scope = lambda: None
        await asyncio.sleep(0)  # a leftover cancellation would arrive here
        self.cancelling_at_end = self.consumer.cancelling()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.run(ITERATIONS_TO_END)
                self._check_the_end()
        finally:
            self.consumer.cancel()
            self.run(ITERATIONS_TO_END)
            self.loop.close()

    def run(self, iterations: int = 1) -> None:
        for _ in range(iterations):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    # The events.

    def put(self) -> None:
        self.put_count += 1
        self.handoff.put(self.put_count)

    def end(self) -> None:
        self.handoff.put(None)

    def fail(self) -> None:
        self.failed = True
        self.handoff.put(LookupError())

    def _put(self) -> set[int]:
        return set(range(1, self.put_count + 1))

    def set_event(self) -> None:
        if not self.event.is_set():
            self.begun_before_the_event = len(self.begun)
        self.event.set()

    def cancel_outside(self) -> None:
        if self.consumer.cancel():
            self.cancelled_outside = True
            # asyncio itself discards the item that is on its way now.
            self.lost_outside = self._put() - {*self.handoff.left, *self.begun}

    def fire(self) -> None:
        if not self.fired:
            self.fired = True
            self.fire_scope()

    # The conditions at the end.

    def _check_the_end(self) -> None:
        assert self.consumer.done(), "the event did not end the loop"
        assert asyncio.all_tasks(self.loop) == set()
        assert list(self.event._waiters) == []
        assert self.reported == []
        error = None if self.consumer.cancelled() else self.consumer.exception()
        if error is not None:
            assert self.failed
            assert isinstance(error, LookupError)
            # asyncio.gather prefers the error of a child to a cancellation.
            assert not self.cancelled_outside or self.source == "gather"
        elif self.cancelled_outside:
            assert self.consumer.cancelled()
        else:
            assert self.cancelling_at_end == 0
            assert self.begun == self.handled, "a body was interrupted"
        assert len(self.begun) - self.begun_before_the_event <= 1 or not self.event.is_set()
        left = [item for item in self.handoff.left if isinstance(item, int)]
        lost = self._put() - {*self.begun, *left}
        assert self.begun + left == sorted(self._put() - lost), "out of order, or twice"
        assert lost <= self.lost_outside


every_source = pytest.mark.parametrize("source", SOURCES)


def now(scene: Scene, action: Callable[[], None]) -> None:
    """At the start of the next iteration: before all ready callbacks."""
    asyncio._set_running_loop(scene.loop)
    try:
        action()
    finally:
        asyncio._set_running_loop(None)


def soon(scene: Scene, action: Callable[[], None]) -> None:
    """In the next iteration: after all ready callbacks."""
    scene.loop.call_soon(action)


def at_every_offset(
    make_scene: Callable[[], Scene], iterations: range, first: Action, *others: Action
) -> None:
    """Run ``first`` in the middle of these iterations, and each of the others in any of them.

    Within an iteration each event is at its start or at its end, and events together are in every order.
    """
    middle = iterations[len(iterations) // 2]
    schedules = dict.fromkeys(
        tuple(sorted(order, key=itemgetter(0)))
        for offsets in product([middle], *[iterations] * len(others))
        for whens in product((now, soon), repeat=len(offsets))
        for order in permutations(zip(offsets, whens, (first, *others), strict=True))
    )
    for schedule in schedules:
        with make_scene() as scene:
            for iteration in range(iterations.stop):
                for offset, when, action in schedule:
                    if offset == iteration:
                        when(scene, partial(action, scene))
                scene.run()


@every_source
@pytest.mark.parametrize("body_iterations", [0, 2])
def test_no_item_is_lost_or_handled_twice_at_any_offset_of_the_event(
    source: str, body_iterations: int
) -> None:
    at_every_offset(lambda: Scene(source, body_iterations), range(2, 9), Scene.put, Scene.set_event)


@every_source
def test_a_cancellation_from_outside_passes_through_at_any_offset_of_the_event(source: str) -> None:
    at_every_offset(lambda: Scene(source), range(2, 7), Scene.set_event, Scene.cancel_outside)


@asynccontextmanager
async def timeout_around(scene: Scene) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(None) as timeout:
            scene.fire_scope = lambda: timeout.reschedule(scene.loop.time())
            yield
    except TimeoutError:
        assert scene.fired


@asynccontextmanager
async def anyio_scope_around(scene: Scene) -> AsyncIterator[None]:
    with anyio.CancelScope() as scope:
        scene.fire_scope = scope.cancel
        yield


@asynccontextmanager
async def task_group_around(scene: Scene) -> AsyncIterator[None]:
    async def fail() -> None:
        raise LookupError

    try:
        async with asyncio.TaskGroup() as group:
            scene.fire_scope = lambda: group.create_task(fail())
            yield
            scene.fire_scope = lambda: None
    except* LookupError:
        assert scene.fired


SCOPES = [timeout_around, anyio_scope_around]
if sys.version_info >= (3, 13):  # before, a failed TaskGroup leaves cancelling() at 1
    SCOPES.append(task_group_around)


@every_source
@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_around_the_loop_catches_its_own_at_any_offset_of_the_event(
    source: str, scope: Scope
) -> None:
    at_every_offset(lambda: Scene(source, scope=scope), range(2, 7), Scene.set_event, Scene.fire)


@pytest.mark.slow
@every_source
@pytest.mark.parametrize("third", [Scene.put, Scene.cancel_outside, Scene.fail])
def test_three_things_at_any_offsets_break_no_rule(source: str, third: Action) -> None:
    at_every_offset(lambda: Scene(source, 1), range(2, 6), Scene.set_event, Scene.put, third)


class Interleavings(RuleBasedStateMachine):
    """The events, in any order; at the end, the event is set and all conditions must be true."""

    scene: Scene

    @initialize(source=st.sampled_from(sorted(SOURCES)), body_iterations=st.integers(0, 3))
    def begin(self, source: str, body_iterations: int) -> None:
        self.scene = Scene(source, body_iterations)

    @rule()
    def an_iteration(self) -> None:
        self.scene.run()

    @rule(
        when=st.sampled_from([now, soon]),
        action=st.sampled_from(
            [Scene.put, Scene.set_event, Scene.cancel_outside, Scene.fail, Scene.end]
        ),
    )
    def something(self, when: When, action: Action) -> None:
        when(self.scene, partial(action, self.scene))

    def teardown(self) -> None:
        with self.scene:
            self.scene.run(2)
            self.scene.set_event()


def check(max_examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_interleaving_loses_an_item_or_interrupts_a_body_or_swallows_a_cancellation() -> None:
    check(max_examples=100, steps=15)


@pytest.mark.slow
@pytest.mark.very_slow
def test_not_one_of_many_interleavings_breaks_a_rule() -> None:
    check(max_examples=500, steps=30)
