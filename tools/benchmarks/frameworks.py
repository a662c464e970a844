"""Frameworks whose shutdown on RabbitMQ is compared with the service's: ``python -m tools.benchmarks.frameworks NAME [MESSAGES]``.

They work as the service of the benchmark does, for BENCH_HANDLER_SECONDS with each message, and print its log
events. With a number of messages, these are published in the framework's own form, and nothing is consumed.
"""

import asyncio
import json
import os
import sys

from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
from taskiq import TaskiqEvents
from taskiq.cli.worker.args import WorkerArgs
from taskiq.cli.worker.run import run_worker
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

URL = os.environ["CONSUMER_BROKER_URL"]
QUEUE = os.environ["CONSUMER_SOURCE"]
PREFETCH = int(os.environ["CONSUMER_CONCURRENCY"])
SECONDS = float(os.environ.get("BENCH_HANDLER_SECONDS", "0"))


def say(event: str) -> None:
    print(json.dumps({"event": event}), flush=True)


async def work() -> None:
    say("handling")
    await asyncio.sleep(SECONDS)
    say("handled")


taskiq_broker = AioPikaBroker(
    URL,
    qos=PREFETCH,
    exchange=Exchange(name=QUEUE, auto_delete=True, durable=False),
    task_queues=[Queue(name=f"{QUEUE}.taskiq")],
    dead_letter_queue=Queue(name=f"{QUEUE}.taskiq.dead"),
)


@taskiq_broker.task(task_name="work")  # here it is __main__, and in the worker it is not
async def task() -> None:
    await work()


@taskiq_broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def started(_: object) -> None:
    say("consuming")


def taskiq() -> None:
    """Its worker, with one process and its defaults."""
    run_worker(
        WorkerArgs(
            broker="tools.benchmarks.frameworks:taskiq_broker",
            modules=[],
            workers=1,
            configure_logging=False,
        )
    )


async def publish_to_taskiq(messages: int) -> None:
    await taskiq_broker.startup()
    for _ in range(messages):
        await task.kiq()
    await taskiq_broker.shutdown()


def faststream(graceful_timeout: float | None = None) -> None:
    broker = RabbitBroker(
        URL,
        default_channel=Channel(prefetch_count=PREFETCH),
        graceful_timeout=graceful_timeout,
        logger=None,
    )

    @broker.subscriber(RabbitQueue(QUEUE, declare=False))
    async def handle(body: bytes) -> None:
        await work()

    app = FastStream(broker)

    @app.after_startup
    async def started() -> None:
        say("consuming")

    asyncio.run(app.run())


def faststream_waiting() -> None:
    faststream(graceful_timeout=25)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        asyncio.run(publish_to_taskiq(int(sys.argv[2])))
    else:
        {f.__name__: f for f in (taskiq, faststream, faststream_waiting)}[sys.argv[1]]()
