# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Several queues (streams, topics) as one source: ``CONSUMER_SOURCE=orders,payments``.

There is one source for each name, with its own connection, retries and dead letters. All share one buffer, from which
the workers take. A message is settled by the source that delivered it.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from heapq import heappop, heappush
from typing import Any, Self

from ..message import DeadLetter, Message, OutgoingMessage
from ..settings import ConsumerSettings
from .requests import together
from .source import Broker

AS_EACH = (
    *("capabilities", "destinations", "origins", "largest_body_bytes"),
    *("longest_hold_seconds", "dead_letters_at_once"),
)


def _by_its_source(method: str) -> Callable[..., Any]:
    def settle(_self: Broker, message: Message, *about: Any) -> Any:
        return getattr(message.source, method)(message, *about)

    return settle


def _of_each(method: str) -> Callable[..., Any]:
    async def do(several: "Several") -> None:
        for source in several.sources:
            await getattr(source, method)()

    return do


class Several(Broker):
    """``make`` makes the source of one name, with a prefetch."""

    ack, retry, reject = map(_by_its_source, ("ack", "retry", "reject"))
    requeue, put_back = map(_by_its_source, ("requeue", "put_back"))
    publish_and_ack, begin_alone = map(_by_its_source, ("publish_and_ack", "begin_alone"))
    declare, prepare, delete = map(_of_each, ("declare", "prepare", "delete"))
    _ack = _retry = _reject = _requeue = ack  # not called

    def __init__(
        self,
        settings: ConsumerSettings,
        make: Callable[[ConsumerSettings, int], Broker],
        prefetch: int,
    ) -> None:
        each = [settings.model_copy(update={"source": name}) for name in settings.sources]
        prefetches = [prefetch] * len(each)
        if settings.prefetch is not None:  # the prefetch of all sources together
            few, more = divmod(prefetch, len(each))
            prefetches = [max(1, few + (place < more)) for place in range(len(each))]
        self._make: Callable[[], list[Broker]] = lambda: [*map(make, each, prefetches)]
        self.sources = self._make()
        for name in AS_EACH:
            setattr(self, name, getattr(self.sources[0], name))
        super().__init__(settings, prefetch)
        self._unite()

    def _unite(self) -> None:
        self._started_count = 0
        self.connectivity, self.parts = self.sources[0].connectivity, self.sources
        for source in self.sources:
            source.buffer, source.suspects = self.buffer, self.suspects
            source.share_count = len(self.sources)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            try:
                for source in self.sources:
                    await opened.enter_async_context(source)
            except BaseException:
                self.sources = self._make()  # a source is used only once
                self._unite()
                raise
            opened.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await together(source.__aexit__(*exc_info) for source in self.sources)

    async def describe(self) -> dict[str, int | str]:
        described = [await source.describe() for source in self.sources]
        return {name: value for one in described for name, value in one.items()}

    @property
    def connected(self) -> bool:
        return all(source.connected for source in self.sources)

    async def __anext__(self) -> Message:
        while not (message := await self.buffer.get()).source._is_taken(message):
            pass
        return message

    async def start(self) -> None:
        for source in self.sources[self._started_count :]:
            source.in_flight = self.in_flight
            await source.start()
            self._started_count += 1

    async def stop(self) -> None:
        self.stopped = True
        await together(source.stop() for source in self.sources)

    async def _stop_fetching(self) -> None:
        """Each source stops fetching in its own `stop`."""

    async def flush(self) -> None:
        await together(source.flush() for source in self.sources)

    async def _publish_all(self, messages: Sequence[OutgoingMessage]) -> None:
        await self.sources[0].publish(messages)

    async def requeue_buffered(self, *others: Message) -> None:
        await together(source.requeue_buffered() for source in self.sources)

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[list[tuple[Broker, Any]]]:
        async with AsyncExitStack() as opened:
            enter = opened.enter_async_context
            yield [(source, await enter(source._reading())) for source in self.sources]

    async def _present_letters(
        self, reading: list[tuple[Broker, Any]]
    ) -> AsyncGenerator[DeadLetter, None]:
        async with AsyncExitStack() as opened:
            heads: list[tuple[float, int, DeadLetter, AsyncGenerator[DeadLetter, None]]] = []
            for place, (source, its) in enumerate(reading):
                letters = await opened.enter_async_context(aclosing(source._present_letters(its)))
                if (letter := await anext(letters, None)) is not None:
                    heappush(heads, (letter.dead_lettered_at, place, letter, letters))
            while heads:
                at, place, letter, letters = heappop(heads)
                letter.receipt = place, letter.receipt
                yield letter
                if (letter := await anext(letters, None)) is not None:  # each source has its order
                    heappush(heads, (max(at, letter.dead_lettered_at), place, letter, letters))

    async def _take_letters(
        self, reading: list[tuple[Broker, Any]], letters: Sequence[DeadLetter], *, replay: bool
    ) -> AsyncIterator[int]:
        of_each: list[list[DeadLetter]] = [[] for _ in reading]
        for letter in letters:
            place, letter.receipt = letter.receipt
            of_each[place].append(letter)
        steps = (
            source._take_letters(its, some, replay=replay)
            for (source, its), some in zip(reading, of_each, strict=True)
            if some
        )
        async for done in _in_turn(steps):
            yield done

    async def count_dead_letters(self) -> int:
        return sum([await source.count_dead_letters() for source in self.sources])

    def _purge_all(self) -> AsyncIterator[int]:
        return _in_turn(source.purge_dead_letters() for source in self.sources)


async def _in_turn(steps: Iterable[AsyncIterator[int]]) -> AsyncIterator[int]:
    """The number processed so far, of all sources."""
    before = done = 0
    for one in steps:
        async for done_here in one:
            done = before + done_here
            yield done
        before = done
