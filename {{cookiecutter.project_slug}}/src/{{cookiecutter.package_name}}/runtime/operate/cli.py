# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""The command line: run, demo, publish, check, dead-letters; new-handler, in a checkout of the service.

Exit codes: 0 done, or drained after a signal; 1 crashed, or check found a difference; 2 settings or usage; 69 the broker cannot be
reached; 75 the drain time passed and work went back to the broker; 128 + n ended or forced by signal n.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TypeVar

import structlog
from pydantic_settings import BaseSettings

from . import systemd
from .brokers import make_source
from .brokers.source import BrokerError, BrokerUnavailable, Source
from .cancellation import (
    CancellationEvent,
    CancellationRequested,
    cancellable_wait,
    make_cancellation_event,
)
from .consumer import EXIT_CRASHED, EXIT_DRAINED, Consumer, Lifespan
from .demo import run_demo
from .handlers import HandlerError, HandlerFunction, Router
from .logs import configure_logs, secrets_of, without_credentials
from .message import OutgoingMessage
from .probes import probes
from .settings import ConsumerSettings, SettingsError, load_settings
from .telemetry import CLOSE_SECONDS, make_telemetry
from .timeline import Timeline
from .vendored import CHECKOUT, NotComparable, find_drift
from .watchdog import Watchdog

log = structlog.get_logger()

T = TypeVar("T")

EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69
EXIT_DIFFERENT = 1
EXIT_BROKEN_PIPE = 128 + 13  # SIGPIPE, by its number: Windows has no such name

# SIGHUP, a closed terminal, stops as SIGTERM does; SIGBREAK is how Windows asks a process group to end.
STOP_SIGNALS = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if name in signal.Signals.__members__
]


class UsageError(Exception):
    """The command line asks for something that cannot be done. Exit code 2."""


@dataclass
class Service:
    """What the service's own code hands to its command line; see `main`."""

    name: str
    handlers: Mapping[str, HandlerFunction]
    settings_class: type[BaseSettings] | None
    lifespan: Lifespan | None
    examples: Mapping[str, bytes]

    def router(self) -> Router:
        return Router(self.handlers)

    def settings(self, **overrides: object) -> ConsumerSettings:
        """The runtime's settings; the service's own are checked too, before anything starts."""
        if self.settings_class is not None:
            load_settings(self.settings_class)
        settings = load_settings(ConsumerSettings, **overrides)
        names = {"source": settings.source or self.name, "group": settings.group or self.name}
        return settings.model_copy(update=names)


def main(
    *,
    name: str,
    handlers: Mapping[str, HandlerFunction],
    settings: type[BaseSettings] | None = None,
    lifespan: Lifespan | None = None,
    examples: Mapping[str, bytes] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the service's command line; returns the exit code.

    ``name`` is the service's name and its default queue; ``settings`` are the service's own; ``lifespan``
    opens and closes what handlers share; ``examples`` are messages for the demo, by type.
    """
    service = Service(name, handlers, settings, lifespan, examples or {})
    _replace_closed_streams()
    arguments = _make_parser(name).parse_args(argv)
    secrets = secrets_of(os.environ.get("CONSUMER_BROKER_URL", ""))
    try:
        exit_code: int = arguments.command(service, arguments)
    except CancellationRequested as stop:
        exit_code = 128 + stop.args[0]
    except BrokenPipeError:  # nobody reads any more, as in: dead-letters list | head
        exit_code = EXIT_BROKEN_PIPE
    except (BrokerError, SettingsError, HandlerError, UsageError) as error:
        exit_code = _exit_code_for(error)
        print(f"{name}: {without_credentials(str(error), secrets)}", file=sys.stderr)
    _flush_output()
    return exit_code


def _exit_code_for(error: Exception) -> int:
    return EXIT_UNAVAILABLE if isinstance(error, BrokerUnavailable) else EXIT_USAGE


def _make_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        description="A message consumer that finishes the message in hand when it is asked to stop.",
        epilog="Settings come from CONSUMER_... environment variables; see .env.example.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="consume until SIGINT or SIGTERM")
    run.set_defaults(command=_run)

    demo = commands.add_parser("demo", help="run on the embedded broker with sample messages")
    demo.add_argument("--timeline", action="store_true", help="draw the stop at the end")
    demo.set_defaults(command=_demo)

    publish = commands.add_parser("publish", help="publish one JSON message, or JSON lines from -")
    publish.add_argument("message", metavar="JSON", help="the message, or - to read JSON lines")
    publish.add_argument("--type", default=None, help="the message's type: which handler gets it")
    publish.set_defaults(command=_publish)

    check = commands.add_parser(
        "check", help="are the settings valid, the broker and its queues there?"
    )
    check.add_argument(
        "--vendored", action="store_true", help="instead: are the template's files as they came?"
    )
    check.set_defaults(command=_check)

    dead_letters = commands.add_parser("dead-letters", help="messages that were given up")
    actions = dead_letters.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("list", help="show the oldest ones; they stay where they are")
    show.add_argument("--limit", type=int, default=100, help="how many (default 100)")
    show.set_defaults(command=_list_dead_letters)
    replay = actions.add_parser("replay", help="move them back to the queue")
    replay.add_argument("--yes", action="store_true", help="do not ask")
    replay.set_defaults(command=_replay_dead_letters)
    purge = actions.add_parser("purge", help="delete them")
    purge.add_argument("--yes", action="store_true", help="do not ask")
    purge.set_defaults(command=_purge_dead_letters)

    new_handler = commands.add_parser(
        "new-handler", help="add a handler, its test and its line in the list (development only)"
    )
    new_handler.add_argument("name", metavar="NAME", help="the message's type, as in refund_issued")
    new_handler.set_defaults(command=_new_handler)
    return parser


# -- the commands


def _run(service: Service, _arguments: argparse.Namespace) -> int:
    settings = service.settings()
    router = service.router()
    configure_logs(
        settings.log_format, settings.log_level, secrets_of(settings.broker_url.get_secret_value())
    )
    in_flight_per_worker = settings.batch_size if router.batched else 1
    most_in_flight = settings.concurrency * in_flight_per_worker
    # Ordered by a key, some wait for others: with more of them here, workers find one that can be taken.
    prefetch = settings.prefetch or min(most_in_flight * (10 if settings.order_by else 1), 65_535)
    source = make_source(settings, prefetch)
    telemetry = make_telemetry(service.name, settings)
    stop_signals = [
        signum
        for signum in STOP_SIGNALS
        # nohup has SIGHUP ignored, so that what it starts outlives the terminal
        if signum.name != "SIGHUP" or signal.getsignal(signum) is not signal.SIG_IGN
    ]

    async def consume(event: CancellationEvent) -> int:
        log.info(
            "starting", service=service.name, broker=settings.broker_scheme, source=settings.source
        )
        consumer = Consumer(source, router, event, settings, service.lifespan, telemetry)
        watchdog = Watchdog(event, stop_signals, settings.drain_seconds, consumer)
        watchdog.start()
        systemd.ping_watchdog()
        exit_code = EXIT_CRASHED
        try:
            async with probes(settings.probe_port, consumer, telemetry):
                try:
                    exit_code = await consumer.run()
                except BrokerError as error:
                    exit_code = _exit_code_for(error)
                    raise
                except Exception as error:  # the lifespan could not start
                    log.error("crashed", error=str(error), exc_info=error)
                finally:
                    flush_seconds = watchdog.finish(exit_code, CLOSE_SECONDS)
                    # From here on the exit code stands: a late signal must not replace it.
                    for signum in stop_signals:
                        signal.signal(signum, signal.SIG_IGN)
                    await telemetry.close(flush_seconds)
                    watchdog.finish(exit_code)
        except SettingsError:  # the probes' port
            exit_code = EXIT_USAGE
            raise
        finally:
            log.info("stopped", exit_code=exit_code)
        return exit_code

    with asyncio.Runner() as runner:
        event = make_cancellation_event(stop_signals, runner.get_loop())
        return runner.run(consume(event))


def _demo(service: Service, arguments: argparse.Namespace) -> int:
    if not service.examples:
        msg = "the demo has nothing to publish: EXAMPLES in handlers/__init__.py is empty"
        raise UsageError(msg)
    router = service.router()
    configure_logs("console", "info")
    timeline = Timeline() if arguments.timeline else None
    with (
        asyncio.Runner() as runner,
        make_cancellation_event(STOP_SIGNALS, runner.get_loop()) as event,
    ):
        return runner.run(
            run_demo(router, service.examples, service.lifespan, event, service.settings, timeline)
        )


def _publish(service: Service, arguments: argparse.Namespace) -> int:
    message_type = arguments.type
    if message_type is None:
        types = service.router().types
        if len(types) > 1:
            msg = f"--type is needed, as there is more than one handler: {', '.join(types)}"
            raise UsageError(msg)
        message_type = types[0]

    async def publish(source: Source) -> int:
        progress = _Progress("published")
        telemetry = make_telemetry(service.name, source.settings)
        try:
            async for bodies in _read_messages(arguments.message):
                messages = [OutgoingMessage(body, message_type) for body in bodies]
                with telemetry.publishing(messages):
                    await source.publish(messages)
                progress.advance(len(bodies))
        finally:
            progress.finish(f"to {source.settings.source}")
            await telemetry.close()
        return EXIT_DRAINED

    return _with_source(service, publish)


def _check(service: Service, arguments: argparse.Namespace) -> int:
    if arguments.vendored:
        return _check_vendored()
    router = service.router()

    async def check(source: Source) -> int:
        print(f"settings   ok, {len(router.types)} handlers: {', '.join(router.types)}")
        print(f"broker     ok, {source.settings.broker_scheme}")
        for name, value in (await source.describe()).items():
            print(f"           {name}: {value}")
        for name, can in asdict(source.capabilities).items():
            answer = "yes" if can else "no, the broker cannot"
            print(f"can do     {name.replace('_', ' ')}: {answer}")
        return EXIT_DRAINED

    return _with_source(service, check)


def _check_vendored() -> int:
    try:
        drift = find_drift()
    except NotComparable as reason:
        raise UsageError(str(reason)) from None
    print(drift if drift else f"vendored   ok, {drift.came} files are as they came")
    return EXIT_DIFFERENT if drift else EXIT_DRAINED


def _list_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def show(source: Source) -> int:
        count = 0
        # Before looking: a broker does not count what is being looked at.
        total = await source.count_dead_letters()
        async for letter in source.dead_letters(arguments.limit):
            count += 1
            print(
                json.dumps(
                    {
                        "id": letter.id,
                        "type": letter.type,
                        "dead_lettered_at": _time_of(letter.dead_lettered_at),
                        "attempts": letter.attempts,
                        "reason": letter.reason,
                    }
                )
            )
        print(f"{count} of {total} dead letters", file=sys.stderr)
        return EXIT_DRAINED

    return _with_source(service, show)


def _replay_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def replay(source: Source) -> int:
        progress = _Progress("replayed")
        async for moved in source.replay_dead_letters():
            progress.advance(moved - progress.count)
        progress.finish(f"to {source.settings.source}")
        return EXIT_DRAINED

    return _after_confirmation(service, arguments, "Move", replay)


def _purge_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def purge(source: Source) -> int:
        progress = _Progress("deleted")
        async for deleted in source.purge_dead_letters():
            progress.advance(deleted - progress.count)
        progress.finish(f"from the dead letters of {source.settings.source}")
        return EXIT_DRAINED

    return _after_confirmation(service, arguments, "Delete", purge)


def _new_handler(_service: Service, arguments: argparse.Namespace) -> int:
    tool = CHECKOUT / "tools/new_handler.py"
    if not tool.exists():
        msg = "new-handler works where tools/new_handler.py is: in a checkout of the service"
        raise UsageError(msg)
    return subprocess.run([sys.executable, str(tool), arguments.name], check=False).returncode


# -- what they share


def _with_source(service: Service, use: Callable[[Source], Awaitable[T]]) -> T:
    """Connect once and use the source; a signal ends it with CancellationRequested(signal)."""
    settings = service.settings()
    configure_logs("console", "error")
    source = make_source(settings)

    async def connect_and_use() -> T:
        async with source:
            return await use(source)

    async def until_signal(event: CancellationEvent) -> T:
        try:
            return await cancellable_wait(connect_and_use(), event)
        except CancellationRequested:
            raise CancellationRequested(event.reason) from None

    with (
        asyncio.Runner() as runner,
        make_cancellation_event(STOP_SIGNALS, runner.get_loop()) as event,
    ):
        return runner.run(until_signal(event))


def _after_confirmation(
    service: Service,
    arguments: argparse.Namespace,
    verb: str,
    use: Callable[[Source], Awaitable[int]],
) -> int:
    async def count(source: Source) -> int:
        return await source.count_dead_letters()

    if not arguments.yes:
        number = _with_source(service, count)
        if number == 0:
            print("no dead letters")
            return EXIT_DRAINED
        if not sys.stdin.isatty():
            msg = "nobody is there to ask: add --yes"
            raise UsageError(msg)
        try:
            answer = input(f"{verb} {number} dead letters of {service.settings().source}? [y/N] ")
        except (EOFError, KeyboardInterrupt):
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("nothing was done")
            return EXIT_DRAINED
    return _with_source(service, use)


async def _read_messages(argument: str) -> AsyncIterator[list[bytes]]:
    """The message on the command line, or standard input's lines as they come. Raises UsageError."""
    if argument != "-":
        yield [_json(argument.encode(errors="surrogateescape"), "the message")]
        return
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue()
    room = threading.Semaphore(2)

    def read() -> None:
        # A daemon thread: a read that never ends keeps neither the connection's heartbeat nor the process.
        # And past sys.stdin, whose lock, held by a thread at exit, would abort the interpreter.
        chunk: bytes | OSError = b"-"
        with suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            while chunk:
                room.acquire()
                try:
                    chunk = os.read(sys.stdin.fileno(), 65_536)
                except OSError as error:
                    chunk = error
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    line_number = 0
    rest = b""
    while chunk := await chunks.get():
        if isinstance(chunk, OSError):
            msg = f"standard input cannot be read: {chunk}"
            raise UsageError(msg)
        room.release()
        *lines, rest = (rest + chunk).split(b"\n")
        bodies: list[bytes] = []
        for line in lines:
            line_number += 1
            try:
                if line.strip():
                    bodies.append(_json(line, f"line {line_number}"))
            except UsageError:
                if bodies:
                    yield bodies  # what came before a bad line is published all the same
                raise
        if bodies:
            yield bodies
    if rest.strip():
        yield [_json(rest, f"line {line_number + 1}")]


def _json(text: bytes, where: str) -> bytes:
    try:
        json.loads(text.decode())  # given bytes, it accepts encodings that no handler does
    except (ValueError, RecursionError) as error:
        msg = f"{where} is not JSON: {error}"
        raise UsageError(msg) from None
    return text.strip()


def _time_of(unix_seconds: float) -> str:
    with suppress(ValueError, OverflowError, OSError):  # what some program has put there
        return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="seconds")
    return str(unix_seconds)


class _Progress:
    """A counter on standard error: live on a terminal, one line at the end otherwise."""

    def __init__(self, verb: str) -> None:
        self.count = 0
        self._verb = verb
        self._started = self._shown = time.monotonic()

    def advance(self, number: int) -> None:
        self.count += number
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown > 0.1:
            self._shown = now
            rate = self.count / (now - self._started)
            print(
                f"\r{self._verb} {self.count:,} ({rate:,.0f}/s)",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def finish(self, where: str) -> None:
        start = "\r\033[K" if sys.stderr.isatty() else ""
        plural = "" if self.count == 1 else "s"
        print(f"{start}{self._verb} {self.count:,} message{plural} {where}", file=sys.stderr)


def _replace_closed_streams() -> None:
    """Who starts a service may close its streams: then Python has None there, and a file or connection
    that is opened next gets the number, and what is written to it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, mode, closefd=False))


def _flush_output() -> None:
    """Flush, so that the interpreter's own flush at exit cannot fail on a closed pipe and change the code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
