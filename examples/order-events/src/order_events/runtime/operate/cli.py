# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The command line: run, demo, publish, declare, check, dead-letters; new-handler, in a checkout of the service."""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from signal import Signals
from typing import TypeVar

from pydantic_settings import BaseSettings

from ..brokers import make_source
from ..brokers.source import MISSING, Broker
from ..cancellation import (
    CancellationEvent,
    CancellationRequested,
    make_cancellation_event,
)
from ..consumer import Lifespan, unless_set
from ..errors import ExitCode, ServiceError, UsageError, forced_exit_code
from ..handlers import HandlerFunction, Router
from ..logs import configure_logs, secrets_of, without_credentials
from ..message import OutgoingMessage
from ..service import serve
from ..settings import ConsumerSettings, load_settings
from ..signals import SHUTDOWN_SIGNALS, forces
from ..telemetry import make_telemetry
from .console import Progress, flush_output, read_messages, replace_closed_streams
from .demo import run_demo
from .timeline import Timeline
from .vendored import CHECKOUT, find_drift

T = TypeVar("T")

EXIT_BROKEN_PIPE = 128 + 13  # SIGPIPE, by its number: Windows has no such name


@dataclass
class Service:
    """The arguments of `main`."""

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
    replace_closed_streams()
    arguments = _make_parser(name).parse_args(argv)
    secrets = secrets_of(os.environ.get("CONSUMER_BROKER_URL", ""))
    try:
        exit_code: int = arguments.command(service, arguments)
    except CancellationRequested as stop:
        exit_code = forced_exit_code(stop.args[0])
    except BrokenPipeError:  # the reader has closed the pipe, as in: dead-letters list | head
        exit_code = EXIT_BROKEN_PIPE
    except ServiceError as error:
        exit_code = error.exit_code
        print(f"{name}: {without_credentials(str(error), secrets)}", file=sys.stderr)
    flush_output()
    return exit_code


def _make_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        description="Message consumer with graceful shutdown.",
        epilog="Settings are CONSUMER_... environment variables; see .env.example.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="consume until SIGINT or SIGTERM, then drain")
    run.set_defaults(command=_run)

    demo = commands.add_parser("demo", help="run on the embedded broker with sample messages")
    demo.add_argument("--timeline", action="store_true", help="draw the shutdown at the end")
    demo.set_defaults(command=_demo)

    publish = commands.add_parser("publish", help="publish one JSON message, or JSON lines from -")
    publish.add_argument("message", metavar="JSON", help="the message, or - to read JSON lines")
    publish.add_argument("--type", default=None, help="message type, which selects the handler")
    publish.set_defaults(command=_publish)

    declare = commands.add_parser("declare", help="create the queues that are missing")
    declare.set_defaults(command=_declare)

    check = commands.add_parser(
        "check", help="validate settings, connection and queues; changes nothing"
    )
    check.add_argument(
        "--vendored", action="store_true", help="verify instead that vendored files are unmodified"
    )
    check.set_defaults(command=_check)

    dead_letters = commands.add_parser(
        "dead-letters", help="list, replay or purge dead-lettered messages"
    )
    actions = dead_letters.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser("list", help="list the oldest ones without removing them")
    show.add_argument("--limit", type=int, default=100, help="maximum number to list (default 100)")
    show.set_defaults(command=_list_dead_letters)
    replay = actions.add_parser("replay", help="move them back to the queue")
    replay.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    replay.set_defaults(command=_replay_dead_letters)
    purge = actions.add_parser("purge", help="delete them")
    purge.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    purge.set_defaults(command=_purge_dead_letters)

    new_handler = commands.add_parser(
        "new-handler", help="add a handler, its test and its entry in HANDLERS (development only)"
    )
    new_handler.add_argument("name", metavar="TYPE", help="message type, as producers write it")
    new_handler.set_defaults(command=_new_handler)
    return parser


# -- the commands


def _run(service: Service, _arguments: argparse.Namespace) -> int:
    return serve(service.name, service.router(), service.settings(), service.lifespan)


def _demo(service: Service, arguments: argparse.Namespace) -> int:
    if not service.examples:
        msg = "the demo has no messages to publish: EXAMPLES in handlers/__init__.py is empty"
        raise UsageError(msg)
    router = service.router()
    configure_logs("console", "info")
    timeline = Timeline() if arguments.timeline else None
    with (
        asyncio.Runner() as runner,
        make_cancellation_event(SHUTDOWN_SIGNALS, runner.get_loop()) as event,
    ):
        return runner.run(
            run_demo(router, service.examples, service.lifespan, event, service.settings, timeline)
        )


def _publish(service: Service, arguments: argparse.Namespace) -> int:
    types, message_type = service.router().types, arguments.type
    if len(types) > 1 and (message_type is None or not {message_type, "*"} & {*types}):
        missing = "--type is required with more than one handler"
        reason = missing if message_type is None else f"no handler takes the type {message_type!r}"
        raise UsageError(f"{reason}: {', '.join(types)}")
    message_type = types[0] if message_type is None else message_type

    async def publish(source: Broker) -> int:
        progress = Progress("published")
        telemetry = make_telemetry(service.name, source.settings)
        try:
            async for bodies in read_messages(arguments.message):
                messages = [OutgoingMessage(body, message_type) for body in bodies]
                with telemetry.publishing(messages):
                    await source.publish(messages)
                progress.advance(len(bodies))
        finally:
            progress.finish(f"to {source.settings.source}")
            await telemetry.close()
        return ExitCode.DRAINED

    return _with_source(service, publish, declare=True)


def _declare(service: Service, _arguments: argparse.Namespace) -> int:
    async def describe(source: Broker) -> int:
        for name, value in (await source.describe()).items():
            print(f"{name}: {value}")
        return ExitCode.DRAINED

    return _with_source(service, describe, declare=True)


def _check(service: Service, arguments: argparse.Namespace) -> int:
    if arguments.vendored:
        return _check_vendored()
    router = service.router()

    async def check(source: Broker) -> int:
        count = len(router.types)
        plural = "" if count == 1 else "s"
        print(f"settings   ok, {count} handler{plural}: {', '.join(router.types)}")
        print(f"broker     ok, {source.settings.broker_scheme}")
        described = await source.describe()
        for name, value in described.items():
            print(f"           {name}: {value}")
        for name, can in asdict(source.capabilities).items():
            answer = "yes" if can else "no"
            print(f"supports   {name.replace('_', ' ')}: {answer}")
        if MISSING in described.values():
            advice = "run `declare` or `run` to create what does not exist"
            print(f"{service.name}: {advice}", file=sys.stderr)
            return ExitCode.CRASHED
        return ExitCode.DRAINED

    return _with_source(service, check)


def _check_vendored() -> int:
    drift = find_drift()
    print(drift or f"vendored   ok, {drift.file_count} files are unmodified")
    return ExitCode.CRASHED if drift else ExitCode.DRAINED


def _list_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def show(source: Broker) -> int:
        count = 0
        # Before listing: brokers do not count letters that are being listed.
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
        return ExitCode.DRAINED

    return _with_source(service, show)


def _replay_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def replay(source: Broker) -> int:
        await source.declare()
        return await _show_steps(source, "replayed", "to", source.replay_dead_letters())

    return _after_confirmation(service, arguments, "Move", replay)


def _purge_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def purge(source: Broker) -> int:
        steps = source.purge_dead_letters()
        return await _show_steps(source, "deleted", "from the dead letters of", steps)

    return _after_confirmation(service, arguments, "Delete", purge)


async def _show_steps(source: Broker, verb: str, where: str, steps: AsyncIterator[int]) -> int:
    progress = Progress(verb)
    try:
        async for done in steps:
            progress.advance(done - progress.count)
    finally:  # also when it is interrupted: so many are done
        progress.finish(f"{where} {source.settings.source}")
    return ExitCode.DRAINED


def _new_handler(_service: Service, arguments: argparse.Namespace) -> int:
    tool = CHECKOUT / "tools/new_handler.py"
    if not tool.exists():
        msg = "new-handler needs tools/new_handler.py: run it in a checkout of the service"
        raise UsageError(msg)
    return subprocess.run([sys.executable, str(tool), arguments.name], check=False).returncode


# -- shared by the commands


def _with_source(
    service: Service, use: Callable[[Broker], Awaitable[T]], declare: bool = False
) -> T:
    """Connect once and use the source; a signal ends it with CancellationRequested(signal)."""
    settings = service.settings()
    configure_logs("console", "error")
    source = make_source(settings)

    async def connect_and_use() -> T:
        async with source:
            if declare:
                await source.declare()
            return await use(source)

    def force(signum: Signals) -> None:
        if forces(signum, event.signals[-1][1] - event.signals[0][1]):
            os._exit(forced_exit_code(signum))

    async def until_signal(event: CancellationEvent) -> T:
        event.on_repeat = force
        try:
            return await unless_set(connect_and_use(), event)
        except CancellationRequested:
            raise CancellationRequested(event.reason) from None

    with (
        asyncio.Runner() as runner,
        make_cancellation_event(SHUTDOWN_SIGNALS, runner.get_loop()) as event,
    ):
        return runner.run(until_signal(event))


def _after_confirmation(
    service: Service,
    arguments: argparse.Namespace,
    verb: str,
    use: Callable[[Broker], Awaitable[int]],
) -> int:
    async def count(source: Broker) -> int:
        return await source.count_dead_letters()

    if not arguments.yes:
        number = _with_source(service, count)
        if number == 0:
            print("no dead letters")
            return ExitCode.DRAINED
        if not sys.stdin.isatty():
            msg = "standard input is not a terminal: pass --yes"
            raise UsageError(msg)
        try:
            answer = input(f"{verb} {number} dead letters of {service.settings().source}? [y/N] ")
        except (EOFError, KeyboardInterrupt):
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("cancelled: no dead letter was changed")
            return ExitCode.DRAINED
    return _with_source(service, use)


def _time_of(unix_seconds: float) -> str:
    with suppress(ValueError, OverflowError, OSError):  # beyond the years of datetime
        return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="seconds")
    return str(unix_seconds)
