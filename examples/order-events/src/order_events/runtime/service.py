# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The whole life of a consuming process, from the first signal handler to the exit code."""

import asyncio
import faulthandler
import gc
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from signal import Signals

import structlog

from .brokers import make_source
from .cancellation import CancellationEvent, make_cancellation_event
from .consumer import Consumer, Lifespan
from .errors import ExitCode, ServiceError
from .handlers import Router
from .logs import configure_logs, leave_message
from .probes import EventLoopLag, probes
from .receipt import Receipt
from .settings import TEMPLATE_VERSION, ConsumerSettings
from .signals import shutdown_signals
from .telemetry import CLOSE_SECONDS, Telemetry, make_telemetry
from .watchdog import Watchdog

log = structlog.get_logger()

MOST_PREFETCH = 65_535
ORDERED_PREFETCH_FACTOR = 10
"""Buffered messages may wait for others of their key or handler: workers need more to find a free one."""


def serve(
    name: str,
    router: Router,
    settings: ConsumerSettings,
    lifespan: Lifespan | None = None,
    telemetry: Telemetry | None = None,
) -> int:
    """Consume until a signal, drain, and return the exit code. ``name`` is the service's.

    Raises BrokerUnavailable or BrokerRefused if it could not start, and SettingsError, such as for a probe port in use.
    """
    faulthandler.enable(2)  # when systemd's watchdog aborts the process, print the stacks
    configure_logs(settings.log_format, settings.log_level)
    _raise_limit_of_open_files()
    signals = shutdown_signals()
    with asyncio.Runner() as runner:
        event = make_cancellation_event(signals, runner.get_loop())
        return runner.run(_serve(name, router, event, settings, lifespan, signals, telemetry))


def prefetch_of(settings: ConsumerSettings, router: Router) -> int:
    """The setting; by default the maximum of in-flight messages, or ten times as many if messages wait for others."""
    in_flight = settings.concurrency * (settings.batch_size if router.batched else 1)
    factor = ORDERED_PREFETCH_FACTOR if settings.order_by or router.most_calls else 1
    return settings.prefetch or min(in_flight * factor, MOST_PREFETCH)


async def _serve(
    name: str,
    router: Router,
    event: CancellationEvent,
    settings: ConsumerSettings,
    lifespan: Lifespan | None,
    signals: Sequence[Signals],
    telemetry: Telemetry | None,
) -> int:
    lag = EventLoopLag()
    sampling = asyncio.create_task(lag.sample(), name="event-loop-lag")
    exit_code: int = ExitCode.CRASHED
    receipt = Receipt(name, event)
    try:
        telemetry = telemetry or make_telemetry(name, settings)
        receipt.version = telemetry.version
        telemetry.event_loop_lag = lag.seconds
        log.info(
            "starting",
            service=name,
            version=telemetry.version,
            template=TEMPLATE_VERSION,
            broker=settings.broker_scheme,
            source=settings.source,
            telemetry=telemetry.exports,
        )
        source = make_source(settings, prefetch_of(settings, router))
        receipt.consumer = consumer = Consumer(source, router, event, settings, lifespan, telemetry)
        watchdog = Watchdog(
            event, signals, settings.drain_seconds, consumer.in_flight, receipt.write
        )
        gc.freeze()  # all modules are loaded: each full collection would spend 10 ms on them
        watchdog.start()
        if find_spec(".systemd", __package__):  # the deployment may be a systemd unit
            systemd = import_module(".systemd", __package__)
            systemd.ping_watchdog(consumer.limits.why_stuck)
            consumer.notify = systemd.notify
        async with probes(settings, consumer, telemetry):
            try:
                exit_code = await consumer.run()
            except ServiceError as error:
                exit_code = error.exit_code
                raise
            except Exception as error:  # the lifespan could not start
                log.error("crashed", error=str(error), exc_info=error)
                receipt.why = f"{type(error).__name__}: {error}"
            finally:
                flush_seconds = watchdog.finish(exit_code, CLOSE_SECONDS)
                # The exit code is final: a late signal must not replace it.
                for signum in signals:
                    signal.signal(signum, signal.SIG_IGN)
                await telemetry.close(flush_seconds)
                watchdog.finish(exit_code)
    except ServiceError as error:
        exit_code, receipt.why = error.exit_code, str(error)
        tell_failed_start(error, settings.log_format)
        raise
    finally:
        sampling.cancel()
        receipt.write(exit_code)
    return exit_code


def tell_failed_start(error: ServiceError, log_format: str) -> None:
    """Report the failure in the log, and in the termination message."""
    log.error("start_failed", reason=str(error))
    leave_message(str(error))
    error.is_shown = log_format == "console"


def _raise_limit_of_open_files() -> None:
    """Raise the soft limit, often 1024 for programs that use select(), to the hard limit."""
    if sys.platform != "win32":
        from resource import RLIMIT_NOFILE, getrlimit, setrlimit

        with suppress(OSError, ValueError):  # macOS says more than it allows
            soft, hard = getrlimit(RLIMIT_NOFILE)
            if soft >= 0:  # not unlimited
                setrlimit(RLIMIT_NOFILE, (max(soft, min(hard % 2**63, 65_536)), hard))
