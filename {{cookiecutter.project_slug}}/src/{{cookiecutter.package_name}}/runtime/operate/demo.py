# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The demo: the service on the embedded broker, with its example messages, until all of them are settled."""

import argparse
import asyncio
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..brokers import make_source
from ..cancellation import CancellationEvent, cancellable_sleep, make_cancellation_event
from ..consumer import Consumer
from ..errors import UsageError
from ..handlers import Router
from ..logs import configure_logs
from ..message import OutgoingMessage
from ..signals import shutdown_signals
from .timeline import Timeline

if TYPE_CHECKING:
    from .cli import Service

MESSAGE_COUNT = 20
PUBLISH_EVERY_SECONDS = 0.2


def run_demo(service: "Service", arguments: argparse.Namespace) -> int:
    """Publish the examples in turn, consume them, and shut down when all are settled or on a signal."""
    if not service.examples:
        raise UsageError("the demo has no messages: EXAMPLES in handlers/__init__.py is empty")
    router = service.router()
    configure_logs("console", "info")
    timeline = Timeline() if arguments.timeline else None
    with (
        asyncio.Runner() as runner,
        make_cancellation_event(shutdown_signals(), runner.get_loop()) as event,
    ):
        return runner.run(_run(service, router, event, timeline))


async def _run(
    service: "Service", router: Router, event: CancellationEvent, timeline: Timeline | None
) -> int:
    with tempfile.TemporaryDirectory(prefix="consumer-demo-") as directory:
        url = f"sqlite:///{Path(directory, 'demo.db').as_posix()}"
        settings = service.settings(broker_url=url, broker_url_file="", prefetch=None)
        source = make_source(settings, settings.concurrency)
        consumer = Consumer(source, router, event, settings, service.lifespan, timeline)
        consuming = asyncio.create_task(consumer.run())
        # Otherwise the demo would wait forever.
        consuming.add_done_callback(lambda _: event.set("demo failed"))
        published = 0
        async with make_source(settings) as publisher:
            await publisher.declare()
            messages = itertools.islice(itertools.cycle(service.examples.items()), MESSAGE_COUNT)
            for message_type, body in messages:
                await publisher.publish([OutgoingMessage(body, message_type)])
                published += 1
                if not await cancellable_sleep(PUBLISH_EVERY_SECONDS, event):
                    break
            while consumer.handled_count + consumer.rejected_count < published:
                if not await cancellable_sleep(0.1, event):
                    break
            event.set("demo finished")
            exit_code = await consuming
            left = (await publisher.describe())[settings.source]
        print(
            f"published {published}, handled {consumer.handled_count},"
            f" dead letters {consumer.rejected_count}, left in the queue {left}"
        )
        if timeline is not None:
            print(timeline.drawn(event.set_at))
    return exit_code
