# ruff: noqa: ASYNC110, ASYNC251, SIM105
"""Handlers for test_rehearse.py: WRONG ones, each with the finding that names its fault, and RIGHT ones.

A program: ``python rehearsed.py NAME,NAME rehearse``, or RIGHT for all of these; variables make its effects() and its lifespan fail. What a handler does to the world is a line in the file WORLD, or a row
of the SQLite database beside it.
"""

import asyncio
import builtins
import os
import signal
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from runtime.handlers import Handles
from runtime.message import Message, OutgoingMessage, Pause, Reject, Retry
from runtime.operate import rehearse
from runtime.operate.cli import Service, main

WORLD = Path(os.environ.get("WORLD", "world"))
SCHEMA = """
CREATE TABLE IF NOT EXISTS handled (id text PRIMARY KEY);
CREATE TABLE IF NOT EXISTS rows (what text, reference text);
CREATE TABLE IF NOT EXISTS orders (reference text PRIMARY KEY, state text);
CREATE TABLE IF NOT EXISTS progress (id text PRIMARY KEY, step integer);
CREATE TABLE IF NOT EXISTS totals (name text PRIMARY KEY, total integer);
INSERT OR IGNORE INTO totals VALUES ('orders', 0);
"""


class Order(BaseModel):
    reference: str


EXAMPLE = os.environ.get("EXAMPLE", '{"reference": "A-1001"}').encode()


# -- the world that handlers change


@contextmanager
def transaction() -> Iterator[sqlite3.Connection]:
    with (
        closing(sqlite3.connect(WORLD.with_suffix(".sqlite"), timeout=10)) as connection,
        connection,
    ):
        yield connection


def add_row(connection: sqlite3.Connection, what: str, order: Order) -> None:
    connection.execute("INSERT INTO rows VALUES (?, ?)", (what, order.reference))


def is_new(connection: sqlite3.Connection, message: Message) -> bool:
    """The check in docs/idempotency.md."""
    statement = "INSERT INTO handled VALUES (?) ON CONFLICT DO NOTHING RETURNING id"
    return connection.execute(statement, (message.id,)).fetchone() is not None


def call_elsewhere(what: str) -> None:
    """A fake of an HTTP call, which records it."""
    with WORLD.open("a") as world:
        world.write(f"{what}\n")


def effects() -> list[str]:
    match os.environ.get("EFFECTS"):
        case "raises":
            raise OSError("no table")
        case "random":
            return [uuid.uuid4().hex]
        case "hangs":
            time.sleep(60)
    with transaction() as connection:
        connection.executescript(SCHEMA)
        rows = [
            *connection.execute("SELECT what, reference FROM rows"),
            *connection.execute("SELECT 'order', reference, state FROM orders"),
        ]
        (total,) = connection.execute("SELECT total FROM totals").fetchone()
    lines = WORLD.read_text().splitlines() if WORLD.exists() else []
    return [*map(str, rows), *lines, *["total"] * total]


# -- not idempotent


async def inserts_a_row(order: Order) -> None:
    with transaction() as connection:
        add_row(connection, "shipment", order)


def appends_to_a_file(order: Order) -> None:
    call_elsewhere(f"line {order.reference}")


async def counts_up(order: Order) -> None:
    with transaction() as connection:
        connection.execute("UPDATE totals SET total = total + 1")


async def calls_outside_of_the_transaction(order: Order, message: Message) -> None:
    with transaction() as connection:
        if not is_new(connection, message):
            return
        call_elsewhere(f"POST {order.reference}")
        add_row(connection, "shipment", order)


async def remembers_in_memory(order: Order, message: Message) -> None:
    if message.id in _seen:
        return
    with transaction() as connection:
        add_row(connection, "shipment", order)
    _seen.add(message.id)


_seen: set[str] = set()


async def records_the_id_afterwards(order: Order, message: Message) -> None:
    with transaction() as connection:
        if connection.execute("SELECT 1 FROM handled WHERE id = ?", (message.id,)).fetchone():
            return
    with transaction() as connection:
        add_row(connection, "shipment", order)
    with transaction() as connection:
        is_new(connection, message)


async def looks_at_the_attempt(order: Order, message: Message) -> None:
    if message.attempt > 1:  # a redelivery after a crash counts no attempt
        return
    with transaction() as connection:
        add_row(connection, "shipment", order)


async def publishes_under_new_ids(order: Order) -> OutgoingMessage:
    return OutgoingMessage(order, "shipped", id=uuid.uuid4().hex, to="queue:shipments")


async def publishes_before_it_fails(order: Order, message: Message) -> None:
    await message.publish(
        OutgoingMessage(order, "shipped", id=uuid.uuid4().hex, to="queue:shipments")
    )
    with transaction() as connection:
        if is_new(connection, message):
            add_row(connection, "shipment", order)


async def inserts_a_batch(orders: list[Order]) -> None:
    with transaction() as connection:
        for order in orders:
            add_row(connection, "shipment", order)


async def fails_on_the_second_delivery(order: Order, message: Message) -> None:
    with transaction() as connection:
        connection.execute("INSERT INTO handled VALUES (?)", (message.id,))
        add_row(connection, "shipment", order)


# -- loses work


async def records_the_id_first(order: Order, message: Message) -> None:
    with transaction() as connection:
        if not is_new(connection, message):
            return
    await asyncio.sleep(0)
    with transaction() as connection:
        add_row(connection, "shipment", order)


async def stops_half_way(order: Order, message: Message) -> None:
    with transaction() as connection:
        if not is_new(connection, message):
            return
        add_row(connection, "shipment", order)
    await asyncio.sleep(0)
    with transaction() as connection:
        add_row(connection, "invoice", order)


async def swallows_a_failure(order: Order, message: Message) -> None:
    with suppress(Exception), transaction() as connection:
        if is_new(connection, message):
            add_row(connection, "shipment", order)


async def rejects_what_would_succeed_later(order: Order, message: Message) -> None:
    try:
        with transaction() as connection:
            if is_new(connection, message):
                add_row(connection, "shipment", order)
    except ConnectionError as error:
        raise Reject("no database") from error


# -- does not end


async def blocks_the_loop(order: Order) -> None:
    time.sleep(0.4)


async def computes_in_the_loop(order: Order) -> int | None:
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        sum(range(1000))
    return None


async def swallows_its_cancellation(order: Order) -> None:
    try:
        await asyncio.sleep(0.001)
    except BaseException:
        pass


async def goes_on_after_its_cancellation(order: Order) -> None:
    for _ in range(4):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.2)


async def pauses_always(order: Order) -> None:
    raise Pause(60, "no database")


async def never_ends(order: Order) -> None:
    WORLD.with_name("began").write_text(str(os.getpid()))
    while True:
        await asyncio.sleep(0.05)


def never_ends_in_a_thread(order: Order) -> None:
    while True:
        time.sleep(0.05)


async def takes_the_signal(order: Order) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        await asyncio.sleep(0.05)


async def leaves_a_task_behind(order: Order) -> None:
    _tasks.add(asyncio.create_task(client_call_later(order.reference)))


_tasks: set[asyncio.Task[None]] = set()


async def client_call_later(what: str) -> None:
    await asyncio.sleep(0.05)
    call_elsewhere(what)


async def leaves_a_thread_behind(order: Order) -> None:
    threading.Thread(target=write_slowly, args=(order.reference,), daemon=True).start()


def write_slowly(what: str) -> None:
    time.sleep(0.05)
    call_elsewhere(what)


async def leaves_a_thread_of_the_pool_behind(order: Order) -> None:
    asyncio.get_running_loop().run_in_executor(None, write_slowly, order.reference)


# -- right


async def only_logs(order: Order) -> None:
    pass


async def inserts_with_the_id(order: Order, message: Message) -> None:
    async with _one_at_a_time:
        with transaction() as connection:
            if is_new(connection, message):
                await asyncio.sleep(0.001)
                add_row(connection, "shipment", order)
                await asyncio.sleep(0.001)
                add_row(connection, "invoice", order)


_one_at_a_time = asyncio.Lock()


def inserts_with_the_id_in_a_thread(order: Order, message: Message) -> None:
    with transaction() as connection:
        if is_new(connection, message):
            add_row(connection, "shipment", order)


async def inserts_a_batch_with_ids(orders: list[Order], messages: list[Message]) -> None:
    with transaction() as connection:
        for order, message in zip(orders, messages, strict=True):
            if is_new(connection, message):
                add_row(connection, "shipment", order)


async def has_a_key_of_its_own(order: Order) -> None:
    with transaction() as connection:
        connection.execute(
            "INSERT INTO orders VALUES (?, 'new') ON CONFLICT DO NOTHING", (order.reference,)
        )


async def sets_a_state(order: Order) -> None:
    with transaction() as connection:
        connection.execute("INSERT OR REPLACE INTO orders VALUES (?, 'paid')", (order.reference,))


async def checkpoints_by_retry(order: Order, message: Message) -> None:
    while (step := await next_step(order, message)) < 5:
        if message.stopping.is_set():
            raise Retry(f"at step {step}")
        await asyncio.sleep(0.01)


async def retries_later(order: Order, message: Message) -> None:
    if message.attempt == 1:
        raise Retry("not in stock yet", delay_seconds=60)
    with transaction() as connection:
        if is_new(connection, message):
            add_row(connection, "shipment", order)


async def next_step(order: Order, message: Message) -> int:
    """Does a step, and records in the same transaction that it is done."""
    with transaction() as connection:
        connection.execute("INSERT OR IGNORE INTO progress VALUES (?, 0)", (message.id,))
        [(step,)] = connection.execute("SELECT step FROM progress WHERE id = ?", (message.id,))
        if step < 5:
            add_row(connection, f"step {step}", order)
            connection.execute("UPDATE progress SET step = step + 1 WHERE id = ?", (message.id,))
    return int(step)


async def publishes_what_follows(order: Order) -> list[OutgoingMessage]:
    await asyncio.sleep(0)
    return [
        OutgoingMessage(order, "shipped", to="queue:shipments"),
        OutgoingMessage(order, "billed", to="exchange:billing"),
    ]


async def pauses_on_a_failure(order: Order, message: Message) -> None:
    try:
        with transaction() as connection:
            if is_new(connection, message):
                add_row(connection, "shipment", order)
    except ConnectionError as error:
        raise Pause(60, "no database") from error


async def cleans_up_when_cancelled(order: Order, message: Message) -> None:
    try:
        await asyncio.sleep(0.01)
    finally:
        await asyncio.sleep(0.01)
    with transaction() as connection:
        if is_new(connection, message):
            add_row(connection, "shipment", order)


async def awaits_all_it_starts(order: Order, message: Message) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(0.01))
        group.create_task(asyncio.to_thread(time.sleep, 0.01))
    task = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    task.cancel()
    with transaction() as connection:
        if is_new(connection, message):
            add_row(connection, "shipment", order)


async def writes_a_file_of_its_id(order: Order, message: Message) -> None:
    new = WORLD.with_name(f"{message.id}.new")
    new.write_text(order.reference)
    new.replace(WORLD.with_name(message.id))


@dataclass
class Client:
    name: str


async def uses_what_lifespan_yields(order: Order, client: Client, message: Message) -> None:
    await asyncio.sleep(0)
    with transaction() as connection:
        if is_new(connection, message):
            add_row(connection, client.name, order)


@asynccontextmanager
async def lifespan() -> AsyncIterator[Client]:
    match os.environ.get("LIFESPAN"):
        case "raises":
            raise ConnectionError("no database")
        case "needs":
            os.environ["DATABASE_URL"]
        case "hangs":
            await asyncio.sleep(60)
    with transaction() as connection:
        connection.executescript(SCHEMA)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(asyncio.sleep(3600))
        yield Client("client")
        task.cancel()


WRONG: dict[Callable[..., Any], str] = {
    inserts_a_row: "effects doubled",
    appends_to_a_file: "effects doubled",
    counts_up: "effects doubled",
    calls_outside_of_the_transaction: "effects doubled",
    remembers_in_memory: "effects doubled",
    records_the_id_afterwards: "effects doubled",
    looks_at_the_attempt: "effects doubled",
    publishes_under_new_ids: "effects doubled",
    publishes_before_it_fails: "effects doubled",
    inserts_a_batch: "effects doubled",
    fails_on_the_second_delivery: "redelivery fails",
    records_the_id_first: "lost",
    stops_half_way: "half done",
    swallows_a_failure: "lost",
    rejects_what_would_succeed_later: "lost",
    blocks_the_loop: "event loop blocked",
    computes_in_the_loop: "event loop blocked",
    swallows_its_cancellation: "cancellation swallowed",
    goes_on_after_its_cancellation: "cancellation swallowed",
    pauses_always: "example fails",
    never_ends: "shutdown ignored",
    never_ends_in_a_thread: "shutdown ignored",
    takes_the_signal: "shutdown ignored",
    leaves_a_task_behind: "work left behind",
    leaves_a_thread_behind: "work left behind",
    leaves_a_thread_of_the_pool_behind: "work left behind",
}
ALSO = {
    "looks_at_the_attempt": ["lost"],  # after the failure of a dependency
}
RIGHT: list[Callable[..., Any]] = [
    only_logs,
    inserts_with_the_id,
    inserts_with_the_id_in_a_thread,
    inserts_a_batch_with_ids,
    has_a_key_of_its_own,
    sets_a_state,
    checkpoints_by_retry,
    retries_later,
    publishes_what_follows,
    pauses_on_a_failure,
    cleans_up_when_cancelled,
    awaits_all_it_starts,
    writes_a_file_of_its_id,
    uses_what_lifespan_yields,
]

if __name__ == "__main__":
    wanted = sys.argv.pop(1).split(",")
    rehearse.RUN_SECONDS = float(os.environ.get("RUN_SECONDS", rehearse.RUN_SECONDS))
    OWN = eval(os.environ.get("OWN", "{}"))
    if wanted == ["RIGHT"]:
        wanted = [one.__name__ for one in RIGHT]
    chosen = {one.__name__: one for one in (*WRONG, *RIGHT) if one.__name__ in wanted}
    HANDLERS = {name: Handles(one, **OWN) for name, one in chosen.items()}
    sys.exit(
        main(
            Service(
                name="rehearsed",
                handlers=HANDLERS,
                lifespan=lifespan,
                examples=dict.fromkeys(HANDLERS, EXAMPLE) if EXAMPLE else {},
                effects=effects,
                failure=getattr(builtins, os.environ.get("FAILURE", "ConnectionError")),
            )
        )
    )
