# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The command line: run, demo, publish, declare, check, dead-letters; new-handler, in a checkout of the service."""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from signal import Signals
from typing import Any

from pydantic_settings import BaseSettings

from ..brokers import MODULE_OF_SCHEME, known_schemes, make_source
from ..brokers.dead_letters import EVERY
from ..brokers.source import MISSING, Broker
from ..cancellation import CancellationRequested, make_cancellation_event
from ..consumer import Lifespan, unless_set
from ..errors import ExitCode, ServiceError, UsageError, forced_exit_code
from ..formats import Decoder
from ..handlers import Around, HandlerFunction, Router
from ..limits import stacks_of_threads
from ..logs import configure_logs
from ..message import OutgoingMessage
from ..redaction import install, redacted
from ..service import serve, tell_failed_start
from ..settings import TEMPLATE_VERSION, ConsumerSettings, load_settings, wanted_log_format
from ..signals import forces, shutdown_signals
from ..telemetry import make_telemetry
from .browse import browse
from .console import Progress, flush_output, read_messages, replace_closed_streams
from .demo import run_demo
from .letters import add_filters, changing, closing, selection_of, shown, try_handlers, whole_number
from .rehearse import run_rehearsal
from .reload import run_reloading
from .vendored import CHECKOUT, find_drift

Use = Callable[[Broker], Coroutine[Any, Any, int]]
ABOUT_REHEARSE = """Each handler handles its example some thirty times, with real effects: let the environment and .env
name test systems. Messages that handlers publish are not sent, and the service's own queue is not touched."""
EXIT_BROKEN_PIPE = 128 + 13  # SIGPIPE, by its number: Windows has no such name


@dataclass(kw_only=True)
class Service:
    """The service that `main` runs.

    ``name`` is the service's name and its default queue; ``settings_class`` is that of its own settings; ``lifespan``
    opens and closes what handlers share; ``around`` wraps every call of a handler; ``decoders`` are for formats other
    than JSON, by content type; ``examples`` are messages for `demo` and `rehearse`, by type. For `rehearse`, ``effects``
    returns what handlers did, and ``failure`` is what they raise when a dependency fails.
    """

    name: str
    handlers: Mapping[str, HandlerFunction]
    settings_class: type[BaseSettings] | None = None
    lifespan: Lifespan | None = None
    around: Around | None = None
    decoders: Mapping[str, Decoder] | None = None
    examples: Mapping[str, bytes] = field(default_factory=dict)
    effects: Callable[[], Any] | None = None
    failure: BaseException | type[BaseException] = ConnectionError

    def router(self) -> Router:
        return Router(self.handlers, self.decoders, self.around)

    def settings(self, **overrides: object) -> ConsumerSettings:
        """The runtime's settings; the service's own are checked too, before anything starts."""
        if self.settings_class is not None:
            load_settings(self.settings_class)
        settings = load_settings(ConsumerSettings, **overrides)
        names = {"source": settings.source or self.name, "group": settings.group or self.name}
        return settings.model_copy(update=names)


Command = Callable[[Service, argparse.Namespace], int]


def main(service: Service, argv: Sequence[str] | None = None) -> int:
    """Run the service's command line; returns the exit code."""
    replace_closed_streams()
    arguments = _make_parser(service.name).parse_args(argv)
    install()
    try:
        exit_code: int = arguments.command(service, arguments)
    except CancellationRequested as stop:
        exit_code = forced_exit_code(stop.args[0])
    except BrokenPipeError:  # the reader has closed the pipe, as in: dead-letters list | head
        exit_code = EXIT_BROKEN_PIPE
    except ServiceError as error:
        exit_code = error.exit_code
        if not error.is_shown:
            print(f"{service.name}: {redacted(str(error))}", file=sys.stderr)
    flush_output()
    if stacks_of_threads():  # the interpreter would wait for an abandoned handler
        os._exit(exit_code)
    return exit_code


def _make_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name,
        description="Message consumer with graceful shutdown.",
        epilog="Settings are CONSUMER_... environment variables; see .env.example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # so that the version stays on one line
    )
    parser.add_argument("--version", action="version", version=_versions(name))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, help: str, to: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = to.add_parser(name, help=help)
        added.set_defaults(command=command)
        return added

    run = add("run", _run, "consume until SIGINT or SIGTERM, then drain")
    about_reload = "start again when a file of the service changes (development only)"
    run.add_argument("--reload", action="store_true", help=about_reload)
    demo = add("demo", run_demo, "run on the embedded broker with sample messages")
    demo.add_argument("--timeline", action="store_true", help="draw a timeline of the shutdown")
    rehearse = add(
        "rehearse", run_rehearsal, "test the handlers under SIGTERM, SIGKILL, double delivery"
    )
    rehearse.description = ABOUT_REHEARSE
    about_messages = "JSON lines with type and body, or the output of dead-letters list --body"
    rehearse.add_argument("--messages", type=Path, metavar="FILE", help=about_messages)
    about_broker = "also on the broker of CONSUMER_BROKER_URL, in temporary queues"
    rehearse.add_argument("--broker", action="store_true", help=about_broker)
    about_seed, about_seconds = "repeat a rehearsal", "time for each message (default 30)"
    rehearse.add_argument("--seed", type=int, default=random.randrange(10_000), help=about_seed)
    rehearse.add_argument("--seconds", type=float, default=30, help=about_seconds)
    rehearse.add_argument("--json", action="store_true", help="print the report as JSON")
    publish = add("publish", _publish, "publish one JSON message, or JSON lines from -")
    publish.add_argument("message", metavar="JSON", help="the message, or - to read JSON lines")
    publish.add_argument("--type", default=None, help="message type, which selects the handler")
    add("declare", _declare, "create missing queues")
    check = add("check", _check, "validate settings, connection and queues; changes nothing")
    check.add_argument(
        "--vendored", action="store_true", help="verify instead that vendored files are unmodified"
    )
    about_dead_letters = "list, show, try, replay, purge or browse dead-lettered messages"
    dead_letters = commands.add_parser("dead-letters", help=about_dead_letters)
    actions = dead_letters.add_subparsers(required=True, metavar="ACTION")
    listing = add("list", _show_dead_letters, "list the oldest letters, without changes", actions)
    listing.set_defaults(headers=False, indent=None)
    add_filters(listing, limit=100)
    listing.add_argument("--body", action="store_true", help="include the bodies")
    show = add("show", _show_dead_letters, "show a letter with its headers and body", actions)
    show.set_defaults(headers=True, body=True, indent=2)
    show.add_argument("ids", metavar="ID", nargs=1, help="message id, as listed")
    about_try = "call this version's handlers on copies, without settling or publishing"
    add_filters(add("try", _try_dead_letters, about_try, actions), limit=10)
    replay = add("replay", _change_dead_letters, "move letters back to the queue", actions)
    purge = add("purge", _change_dead_letters, "delete letters", actions)
    for one in (replay, purge):
        one.set_defaults(replay=one is replay)
        add_filters(one)
        about_rate = "maximum of letters per second (default unlimited)"
        one.add_argument("--rate", type=whole_number, help=about_rate)
        one.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    page = add("browse", _browse_dead_letters, "serve a web page on 127.0.0.1", actions)
    page.add_argument("--port", type=int, default=0, help="port of the page (default any)")
    about_new_handler = "add a handler, its test and its lines in HANDLERS (development only)"
    new_handler = add("new-handler", _new_handler, about_new_handler)
    new_handler.add_argument("name", metavar="TYPE", help="message type, as producers write it")
    return parser


def _versions(name: str) -> str:
    """The versions of the service, if it is installed, and of the template; and the brokers except the embedded one."""
    version = next((found.version for found in metadata.distributions(name=name)), "unknown")
    brokers = [*dict.fromkeys(MODULE_OF_SCHEME[scheme] for scheme in known_schemes())]
    names = ", ".join(brokers[1:] or brokers)
    return f"{name} {version} (cookiecutter-consumer {TEMPLATE_VERSION}, {names})"


# -- the commands


def _run(service: Service, arguments: argparse.Namespace) -> int:
    if arguments.reload:
        return run_reloading()
    try:
        router, settings = service.router(), service.settings()
    except ServiceError as error:
        log_format = wanted_log_format()
        configure_logs(log_format, "error")
        tell_failed_start(error, log_format)
        raise
    return serve(service.name, router, settings, service.lifespan)


def _publish(service: Service, arguments: argparse.Namespace) -> int:
    router, message_type = service.router(), arguments.type
    types = router.types
    if len(types) > 1 and (message_type is None or router.find(message_type) is None):
        missing = "--type is required with more than one handler"
        reason = missing if message_type is None else f"no handler takes the type {message_type!r}"
        raise UsageError(f"{reason}: {', '.join(types)}")
    message_type = types[0] if message_type is None else message_type

    async def publish(source: Broker) -> int:
        await source.prepare()
        telemetry = make_telemetry(service.name, source.settings)
        try:
            with Progress("published", redacted(f"to {source.settings.source}")) as progress:
                async for bodies in read_messages(arguments.message):
                    messages = [OutgoingMessage(body, message_type) for body in bodies]
                    with telemetry.publishing(messages):
                        await source.publish(messages)
                    progress.advance(len(bodies))
        finally:
            await telemetry.close()
        return ExitCode.DRAINED

    return _with_source(service, publish)


def _declare(service: Service, _arguments: argparse.Namespace) -> int:
    async def declare(source: Broker) -> int:
        await source.declare()
        for name, value in (await source.describe()).items():
            print(f"{redacted(name)}: {redacted(str(value))}")
        return ExitCode.DRAINED

    return _with_source(service, declare)


def _check(service: Service, arguments: argparse.Namespace) -> int:
    if arguments.vendored:
        drift, count = find_drift()
        print("\n".join(drift) or f"vendored   ok, {count} files are unmodified")
        return ExitCode.CRASHED if drift else ExitCode.DRAINED
    router = service.router()

    async def check(source: Broker) -> int:
        count = len(router.types)
        plural = "" if count == 1 else "s"
        print(f"settings   ok, {count} handler{plural}: {', '.join(router.types)}")
        print(f"broker     ok, {source.settings.broker_scheme}")
        described = await source.describe()
        for name, value in described.items():
            print(f"           {redacted(name)}: {redacted(str(value))}")
        for name, can in asdict(source.capabilities).items():
            print(f"supports   {name.replace('_', ' ')}: {'yes' if can else 'no'}")
        if MISSING in described.values():
            advice = "run `declare` or `run` to create what does not exist"
            print(f"{service.name}: {advice}", file=sys.stderr)
            return ExitCode.CRASHED
        return ExitCode.DRAINED

    return _with_source(service, check)


def _show_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    async def show(source: Broker) -> int:
        count = 0
        # Before listing: brokers do not count letters that are being listed.
        total = await source.count_dead_letters()
        async with closing(source.dead_letters(selection=selection_of(arguments))) as letters:
            async for letter in letters:
                count += 1
                about = shown(letter, body=arguments.body, headers=arguments.headers)
                print(json.dumps(about, indent=arguments.indent))
        if not arguments.headers:
            print(f"{count} of {total} dead letters", file=sys.stderr)
        elif not count:
            print(f"{service.name}: no dead letter has this id", file=sys.stderr)
            return ExitCode.CRASHED
        return ExitCode.DRAINED

    return _with_source(service, show)


def _try_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    router = service.router()

    async def try_them(source: Broker) -> int:
        exit_code, count = ExitCode.DRAINED, 0
        configure_logs("console", "critical")  # standard output has the outcomes
        reading = source.dead_letters(selection=selection_of(arguments))
        async with closing(try_handlers(source, router, service.lifespan, reading)) as outcomes:
            async for outcome in outcomes:
                count += 1
                print(json.dumps(outcome), flush=True)
                if outcome["outcome"] != "handled":
                    exit_code = ExitCode.CRASHED
        print(f"tried {count} copies: nothing was settled or published", file=sys.stderr)
        return exit_code

    return _with_source(service, try_them)


def _browse_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    router = service.router()

    async def serve_page(source: Broker) -> int:
        await source.count_dead_letters()  # raises if the broker stores none
        await browse(source, router, service.lifespan, arguments.port)
        return ExitCode.DRAINED

    with suppress(CancellationRequested):  # a signal ends the command
        return _with_source(service, serve_page)
    return ExitCode.DRAINED


def _change_dead_letters(service: Service, arguments: argparse.Namespace) -> int:
    replay = arguments.replay
    verb, where = ("replayed", "to") if replay else ("deleted", "from the dead letters of")

    async def change_them(source: Broker) -> int:
        with Progress(verb, redacted(f"{where} {source.settings.source}")) as progress:
            async with await changing(source, selection_of(arguments), replay=replay) as steps:
                async for done in steps:
                    progress.advance(done - progress.count)
        return ExitCode.DRAINED

    return _after_confirmation(service, arguments, "Move" if replay else "Delete", change_them)


def _new_handler(_service: Service, arguments: argparse.Namespace) -> int:
    tool = CHECKOUT / "tools/new_handler.py"
    if not tool.exists():
        raise UsageError("new-handler needs tools/new_handler.py, in a checkout of the service")
    return subprocess.run([sys.executable, str(tool), arguments.name], check=False).returncode


# -- shared by the commands


def _with_source(service: Service, use: Use) -> int:
    """Connect once and use the source; a signal raises CancellationRequested(signal)."""
    settings = service.settings()
    configure_logs("console", "error")
    source = make_source(settings)

    async def connect_and_use() -> int:
        async with source:
            return await use(source)

    def force(signum: Signals) -> None:
        if forces(signum, event.signals[-1][1] - event.signals[0][1]):
            os._exit(forced_exit_code(signum))

    with (
        asyncio.Runner() as runner,
        make_cancellation_event(shutdown_signals(), runner.get_loop()) as event,
    ):
        event.on_repeat = force
        try:
            return runner.run(unless_set(connect_and_use(), event))
        except CancellationRequested:
            raise CancellationRequested(event.reason) from None


def _after_confirmation(
    service: Service, arguments: argparse.Namespace, verb: str, use: Use
) -> int:
    if not arguments.yes:
        chosen = replace(selection_of(arguments), rate=EVERY.rate)

        async def count(source: Broker) -> int:
            if chosen == EVERY:
                return await source.count_dead_letters()
            async with closing(source.dead_letters(selection=chosen)) as letters:
                return len([None async for _ in letters])

        number = _with_source(service, count)
        if number == 0:
            print("no dead letters")
            return ExitCode.DRAINED
        if not sys.stdin.isatty():
            raise UsageError("standard input is not a terminal: pass --yes")
        answer, source = "", redacted(service.settings().source)
        with suppress(EOFError, KeyboardInterrupt):
            answer = input(f"{verb} {number} dead letters of {source}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            print("cancelled: no dead letter was changed")
            return ExitCode.DRAINED
    return _with_source(service, use)
