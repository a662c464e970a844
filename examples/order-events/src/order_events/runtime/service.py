# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The whole life of a consuming process, from the first signal handler to the exit code."""

import asyncio
import faulthandler
import signal
from collections.abc import Sequence
from signal import Signals

import structlog

from . import systemd
from .brokers import make_source
from .brokers.source import Source
from .cancellation import CancellationEvent, make_cancellation_event
from .consumer import Consumer, Lifespan
from .errors import ExitCode, ServiceError
from .handlers import Router
from .logs import configure_logs, secrets_of
from .probes import probes
from .settings import ConsumerSettings
from .signals import shutdown_signals
from .telemetry import CLOSE_SECONDS, Telemetry, make_telemetry
from .watchdog import Watchdog

log = structlog.get_logger()

MOST_PREFETCH = 65_535
ORDERED_PREFETCH_FACTOR = 10
"""With order by key, many buffered messages wait for others: workers need more of them to find one to take."""


def serve(
    name: str, router: Router, settings: ConsumerSettings, lifespan: Lifespan | None = None
) -> int:
    """Consume until a signal, drain, and return the exit code. ``name`` is the service's.

    Raises BrokerUnavailable or BrokerRefused if it could not start, and SettingsError if the probe port is taken.
    """
    faulthandler.enable(2)  # when systemd's watchdog ends it, standard error has the stacks
    configure_logs(
        settings.log_format, settings.log_level, secrets_of(settings.broker_url.get_secret_value())
    )
    source = make_source(settings, prefetch_of(settings, router))
    telemetry = make_telemetry(name, settings)
    signals = shutdown_signals()
    with asyncio.Runner() as runner:
        event = make_cancellation_event(signals, runner.get_loop())
        return runner.run(
            _serve(name, source, router, event, settings, lifespan, telemetry, signals)
        )


def prefetch_of(settings: ConsumerSettings, router: Router) -> int:
    """The setting, else as many messages as can be in flight."""
    in_flight = settings.concurrency * (settings.batch_size if router.batched else 1)
    factor = ORDERED_PREFETCH_FACTOR if settings.order_by else 1
    return settings.prefetch or min(in_flight * factor, MOST_PREFETCH)


async def _serve(
    name: str,
    source: Source,
    router: Router,
    event: CancellationEvent,
    settings: ConsumerSettings,
    lifespan: Lifespan | None,
    telemetry: Telemetry,
    signals: Sequence[Signals],
) -> int:
    log.info("starting", service=name, broker=settings.broker_scheme, source=settings.source)
    consumer = Consumer(source, router, event, settings, lifespan, telemetry)
    watchdog = Watchdog(event, signals, settings.drain_seconds, consumer.in_flight)
    watchdog.start()
    systemd.ping_watchdog()
    exit_code: int = ExitCode.CRASHED
    try:
        async with probes(settings.probe_port, consumer, telemetry):
            try:
                exit_code = await consumer.run()
            except ServiceError as error:
                exit_code = error.exit_code
                raise
            except Exception as error:  # the lifespan could not start
                log.error("crashed", error=str(error), exc_info=error)
            finally:
                flush_seconds = watchdog.finish(exit_code, CLOSE_SECONDS)
                # The exit code is final: a late signal must not replace it.
                for signum in signals:
                    signal.signal(signum, signal.SIG_IGN)
                await telemetry.close(flush_seconds)
                watchdog.finish(exit_code)
    except ServiceError as error:
        exit_code = error.exit_code
        raise
    finally:
        log.info("stopped", exit_code=int(exit_code))
    return exit_code
