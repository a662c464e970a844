# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The demo: the service on the embedded broker, with its example messages, until all of them are settled."""

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..brokers import make_source
from ..cancellation import CancellationEvent, cancellable_sleep
from ..consumer import Consumer, Lifespan
from ..handlers import Router
from ..message import OutgoingMessage
from ..settings import ConsumerSettings
from .timeline import Timeline

MESSAGE_COUNT = 20
PUBLISH_EVERY_SECONDS = 0.2


async def run_demo(
    router: Router,
    examples: Mapping[str, bytes],
    lifespan: Lifespan | None,
    event: CancellationEvent,
    make_settings: Callable[..., ConsumerSettings],
    timeline: Timeline | None = None,
) -> int:
    """Publish the examples in turn, consume them, and shut down when all are settled or on a signal."""
    with tempfile.TemporaryDirectory(prefix="consumer-demo-") as directory:
        url = f"sqlite:///{Path(directory, 'demo.db').as_posix()}"
        settings = make_settings(broker_url=url, broker_url_file="", prefetch=None)
        consumer = Consumer(
            make_source(settings, settings.concurrency), router, event, settings, lifespan, timeline
        )
        consuming = asyncio.create_task(consumer.run())
        # Else the demo would wait forever.
        consuming.add_done_callback(lambda _: event.set("demo failed"))
        published = 0
        async with make_source(settings) as publisher:
            await publisher.declare()
            messages = itertools.islice(itertools.cycle(examples.items()), MESSAGE_COUNT)
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
