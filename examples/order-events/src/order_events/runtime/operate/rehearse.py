# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The rehearsal: the service's handlers under SIGTERM, SIGKILL, double delivery and failures, at seeded moments.

Each trial is a child process with the whole service and its own messages (trial.py). A second process handles the
remaining messages. Then the outcome, and the effects that ``effects`` counts, must equal those of an undisturbed run.
"""

import argparse
import asyncio
import base64
import inspect
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from random import Random
from threading import Thread
from typing import TYPE_CHECKING, Any

from ..brokers import make_source
from ..brokers.source import Broker
from ..errors import ExitCode, ServiceError, UsageError
from ..handlers import Handler
from ..message import OutgoingMessage
from ..redaction import redacted
from ..service import serve
from ..settings import ConsumerSettings
from .console import Progress
from .trial import AFTER, LONGEST_DELAY_SECONDS, Kind, Trial, is_ours, note

if TYPE_CHECKING:
    from .cli import Service

RUN_SECONDS = 20.0
"""Then a child process gets SIGTERM; it has its drain time and `CLOSE_SECONDS`: its watchdog ends it before."""
CLOSE_SECONDS = 12.0
LEASE_SECONDS = 90.0  # added, for a server to redeliver what a killed process had
BLOCKED_SECONDS = 0.2
MOST = {"SIGTERM": 4, "deadline": 2, "failure": 4, "SIGKILL": 12}  # moments of each handler
KEPT_ALL = "nothing lost, nothing doubled, each shutdown in time"
DOCS = "https://github.com/OWNER/cookiecutter-consumer/blob/main/docs"
FOR_REAL = "note: handlers have real effects on the systems that the environment and .env name"
SETTINGS: dict[str, Any] = {
    **{"broker_url_file": "", "bindings": "", "declare": True, "type_from": "", "prefetch": None},
    **dict.fromkeys(("retry_seconds", "retry_max_seconds"), LONGEST_DELAY_SECONDS),
    **{"batch_seconds": 0.02, "probe_port": 0},
    **{"breaker_failures": 0, "connect_seconds": 10, "log_format": "json", "log_level": "info"},
}
"""Replaces the service's own settings that would reach others, or make a trial slow."""
BETWEEN = "between the work and its acknowledgement"
OPTIONS = "client_id|subject|filter_subjects|deliver_policy|group_instance_id|auto_offset_reset"
OPTION = re.compile(rf"(?<=[?&])({OPTIONS})=[^&#]*&?")
"""The options of a broker's URL that belong to the service's own queue and its consumers."""
REST = {"settled", "rejected", "published"}
"""The notes to take from the process that finishes the rest."""
ADVICE = {
    "lost": "let a failure raise, and record message.id in the transaction that does the work: idempotency.md",
    "effects doubled": "make it idempotent: record message.id in the transaction that does the work: idempotency.md",
    "half done": "do all of the work in one transaction, with message.id: idempotency.md",
    "redelivery fails": "let a redelivered message succeed without an effect: idempotency.md",
    "shutdown ignored": "in long work check message.stopping, save the progress and raise Retry(): shutdown.md",
    "shutdown fails": "close the resources of lifespan in time, and without an error: shutdown.md",
    "event loop blocked": "write a plain `def`, which runs in a thread, or await an async client: handlers.md",
    "cancellation swallowed": "let CancelledError pass: catch Exception, never BaseException: shutdown.md",
    "work left behind": "await the tasks that the handler starts, as asyncio.TaskGroup does: testing.md",
    "example fails": "correct the example, or provide the handler's dependencies: testing.md",
}
VARIED = re.compile(
    rb'(?<=")(?!\d{4}-\d\d)([^"\\]*?)(\d{2,})(?="\s*[,}\]])|([iI]d"\s*:\s*)(\d{2,})'
)


@dataclass
class Finding:
    handler: str
    kind: str
    text: str
    advice: str
    trials: int = 1

    def __str__(self) -> str:
        more = f" (in {self.trials} trials)" if self.trials > 1 else ""
        return f"{self.handler}: {self.kind}: {self.text}{more}; {self.advice}"


@dataclass
class Rehearsed:  # one handler
    trials: int = 0
    moments: int = 0
    longest_seconds: float = 0.0
    hints: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A child process; its exit code is negative for a signal, and None if it did not end by itself."""

    exit_code: int | None
    lines: list[dict[str, Any]]
    ids: set[str] = field(default_factory=set)
    effects: Counter[str] = field(default_factory=Counter)

    def all(self, name: str) -> list[Any]:
        """The values that the trial noted under this name."""
        return [one[name] for one in self.lines if name in one and "event" not in one]

    def why(self, otherwise: str) -> str:
        events = map(_with_type, self.events("start_failed", "crashed"))
        return str([*events, *self.all("failed"), otherwise][0])

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [one for one in self.lines if one.get("event") in names]

    @property
    def left(self) -> set[str]:
        return self.ids - {*self.all("settled")}

    @property
    def handled(self) -> bool:
        return not (self.left or self.all("rejected"))


class Rehearsal:
    """The rehearsal of all handlers on one broker; ``findings`` and ``handlers`` are its result."""

    def __init__(
        self, service: "Service", url: str, directory: Path, arguments: argparse.Namespace
    ) -> None:
        self.findings: dict[tuple[str, str], Finding] = {}
        self.handlers: dict[str, Rehearsed] = {}
        self._service, self._embedded = service, not url
        self._seed, self._seconds = arguments.seed, arguments.seconds
        self._file, self._output = directory / "rehearsal.db", directory / "output"
        self.name = f"{service.name}-rehearsal-{uuid.uuid4().hex[:8]}"
        self.settings = service.settings(**SETTINGS, broker_url=url or f"sqlite:///{self._file}")
        self._effects: Counter[str] = Counter()
        self._failure = _made(service.failure)
        self._count = 0
        self._progress = Progress("rehearsed", f"on {self.settings.broker_scheme}")

    def run(self, examples: list[OutgoingMessage]) -> None:
        """Raises UsageError, with one sentence, if the rehearsal is impossible."""
        router = self._service.router()
        with self._progress:
            self._effects = self._read_effects()
            if self._read_effects() != self._effects:
                msg = "effects() is not repeatable: two calls in a row returned different effects"
                raise UsageError(msg)
            for place, example in enumerate(examples):
                if (handler := router.find(example.type)) is None:
                    msg = f"no handler takes the type {example.type!r}: {', '.join(router.types)}"
                    raise UsageError(msg)
                handler.limit(self.settings)
                self._example, self._varies, self._counts_only = example, False, False
                own = dict.fromkeys(("source", "group"), f"{self.name}-{place}")
                self.settings = self.settings.model_copy(update=own)
                try:
                    self._rehearse(handler, Random(f"{self._seed} {place}"))
                finally:
                    self._delete()
            for name in router.handlers.keys() - self.handlers.keys():
                self.handlers[name] = Rehearsed(hints=["it was not rehearsed: it has no example"])

    def _delete(self) -> None:
        run = self._fork(lambda: asyncio.run(_on(self.settings, lambda source: source.delete())))
        if run.exit_code != 0:
            why = redacted(run.why("it took too long"))
            print(f"{self.settings.source} was not deleted: {why}", file=sys.stderr)

    # -- one handler

    def _rehearse(self, handler: Handler, chance: Random) -> None:
        until, name = time.monotonic() + self._seconds, handler.name
        about = self.handlers.setdefault(name, Rehearsed())
        first = self._try()
        if not self._is_usable(name, first):
            return
        moments = first.all("moments")[0]
        about.moments = max(about.moments, len(moments))
        self._varies = True
        second = self._try(traced=False)
        if not (second.handled and second.effects.total() == first.effects.total()):
            self._varies = False
            second = self._try(traced=False)
        if not second.handled or second.effects.total() < first.effects.total():
            about.hints.append("its example has effects only once: use --messages with several")
        elif self._service.effects and not first.effects:
            about.hints.append("effects() does not count its work")
        if not second.handled:
            return
        about.longest_seconds = max(about.longest_seconds, *second.all("run_seconds"))
        blocked = second.all("blocked_seconds")
        if blocked[0] > BLOCKED_SECONDS:  # or the machine was busy
            blocked += self._try(traced=False).all("blocked_seconds")
        if min(blocked) > BLOCKED_SECONDS:
            where = _short(first.all("longest_line")[0])
            self._find(name, "event loop blocked", f"for {min(blocked):.1f} s at {where}")
        if left := [*first.all("left")[0], *second.all("left")[0]]:
            self._find(name, "work left behind", f"it returned while {left[0]} was at work")
            return  # the time of its effects is random
        # If the effects differ, such as by times or numbers, only their count is compared.
        self._counts_only = second.effects != first.effects
        most = min(self.settings.concurrency, 3) if self._embedded and self._varies else 1
        if handler.batched and most > 1:  # a batch may have one effect for three messages
            several = self._try(count=most, traced=False).effects.total()
            most = most if several == most * second.effects.total() else 1
        for trial in self._plan(handler, moments, most, chance):
            if time.monotonic() > until:
                about.hints.append(f"not all trials in {self._seconds:g} s: --seconds gives more")
                break
            about.trials += 1
            self._judge(name, trial[0], self._try(*trial), self._comparable(second.effects))

    def _is_usable(self, name: str, run: Run) -> bool:
        """Whether the example is handled; otherwise adds a finding, or raises an error."""
        ended = run.all("ended")
        if not run.events("consuming"):
            cause = run.why(f"lifespan did not open within {RUN_SECONDS:g} s")
            raise UsageError(f"the service cannot start, so nothing was rehearsed: {cause}")
        if reasons := run.all("rejected"):
            self._find(name, "example fails", f"its own example became a dead letter: {reasons[0]}")
        elif run.left and run.exit_code == 0 and ended[-1:] == ["Retry"]:
            self.handlers[name].hints.append("it runs long, and saves its progress on SIGTERM")
        elif run.left and run.exit_code == 0:
            why = [*ended[-1:], "it was not delivered"]
            self._find(name, "example fails", f"its own example is not handled: {why[0]}")
        else:
            self._judge_shutdown(name, run, "SIGTERM after it had run for long")
        return run.handled and run.exit_code == 0

    def _plan(
        self, handler: Handler, moments: list[Any], most: int, chance: Random
    ) -> list[tuple[Kind, int, int]]:
        """The kinds of trial, their moments, and the number of messages at a time. The first ones show most."""
        numbered = list(enumerate(moments, 1))
        chance.shuffle(numbered)  # a line that runs often may be disturbed at any of its runs
        distinct = {(kind, where, may_fail): n for n, (kind, where, may_fail) in numbered}
        is_final = handler.rejects(self._failure) or handler.max_attempts == 1  # as declared
        places: dict[Kind, list[int]] = {
            "SIGTERM": [n for (kind, _, _), n in distinct.items() if kind != "line"] or [1],
            "deadline": [n for (kind, _, _), n in distinct.items() if kind == "suspended"],
            "failure": [n for (_, _, may_fail), n in distinct.items() if may_fail and not is_final],
            "SIGKILL": [*distinct.values()],
        }
        signals: tuple[Kind, Kind] = ("SIGKILL", "SIGTERM")
        planned = [(kind, AFTER, 1) for kind in signals]
        for kind, found in places.items():
            planned += [(kind, number, 1) for number in found[: MOST[kind]]]
        if not self._embedded:  # its leases have their real length
            return planned[:2] + chance.sample(planned[2:], min(len(planned) - 2, 2))
        if most > 1:
            number = chance.randint(1, most * len(moments) or 1)
            planned += [(kind, number, most) for kind in signals]
        return planned

    # -- one trial

    def _try(
        self, kind: Kind = "undisturbed", moment: int = 0, count: int = 1, *, traced: bool = True
    ) -> Run:
        if self._embedded:  # without the messages that an earlier trial has left
            self.settings = self.settings.model_copy(update={"source": f"trial-{self._count}"})
        messages: list[OutgoingMessage] = []
        names: dict[str, str] = {}
        for _ in range(count):
            self._count += 1
            body, varied = _vary(self._example.body, self._count if self._varies else 0)
            messages.append(replace(self._example, body=body, id=""))
            names |= {**varied, messages[-1].id: "ID"}
        self._progress.advance(count)
        drain = {"drain_seconds": 0} if kind == "deadline" else {}
        trial = Trial(kind, moment, count, self._failure, traced)
        run = self._serve(messages, trial, concurrency=count, **drain)
        run.ids = {one.id for one in messages}
        if run.left and kind != "undisturbed":
            if self._embedded:  # otherwise its dead consumer keeps its messages for 30 s
                with closing(sqlite3.connect(self._file)) as file, file:
                    file.execute("UPDATE consumers SET expires_at = 0")
            rest = Trial("undisturbed", 0, len(run.left), self._failure, traced=False)
            run.lines += [one for one in self._serve([], rest).lines if REST & one.keys()]
        before, self._effects = self._effects, self._read_effects()
        for effect, number in (self._effects - before).items():
            for new, old in names.items():
                effect = effect.replace(new, old)
            run.effects[effect] += number
        run.effects.update(text for text, _ in {(*one,) for one in run.all("published")})
        run.effects = self._comparable(run.effects)
        return run

    def _comparable(self, effects: Counter[str]) -> Counter[str]:
        return Counter(effects=effects.total()) if self._counts_only else effects

    def _serve(self, messages: list[OutgoingMessage], trial: Trial, **overrides: Any) -> Run:
        service, settings = self._service, self.settings.model_copy(update=overrides)

        async def publish(source: Broker) -> None:
            await source.declare()
            if not source.capabilities.retains_before_first_consumer:
                await source.start()  # so that its session begins
                await source.stop()
            await source.publish(messages)

        def work() -> int:
            if messages:
                asyncio.run(_on(settings, publish))
            return serve(service.name, service.router(), settings, service.lifespan, trial)

        lease = 0 if messages or self._embedded else LEASE_SECONDS
        return self._fork(work, settings.drain_seconds, lease)

    def _read_effects(self) -> Counter[str]:
        """How often each effect occurs: a mapping's values by name; other objects by their repr."""
        if (effects := self._service.effects) is None:
            return Counter()

        def work() -> None:
            found = effects()
            if inspect.iscoroutine(found):
                found = asyncio.run(found)
            note(effects=Counter(found if isinstance(found, Mapping) else map(repr, found or ())))

        run = self._fork(work)
        if not run.all("effects"):
            msg = "effects() failed: " + run.why(f"it did not return within {RUN_SECONDS:g} s")
            raise UsageError(msg)
        return Counter(run.all("effects")[0])

    def _fork(
        self, work: Callable[[], int | None], drain_seconds: float = 0, more: float = 0
    ) -> Run:
        """Run the work in a child process. At the end the child's process group is killed."""
        sys.stdout.flush()
        if sys.platform == "win32":
            raise UsageError("rehearse needs fork and SIGKILL: run it on Linux or macOS")
        self._output.write_bytes(b"")
        child = get_context("fork").Process(target=_be_a_child, args=(work, self._output))
        try:
            child.start()
            child.join(RUN_SECONDS + more)
            if child.is_alive():
                child.terminate()
                child.join(drain_seconds + CLOSE_SECONDS)
            exit_code = child.exitcode
        finally:
            if child.pid is not None:
                with suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.kill()  # it may not have its group yet
                child.join()
        return Run(exit_code, [*map(_parsed, self._output.read_bytes().splitlines())])

    # -- the verdict

    def _judge(self, name: str, kind: Kind, run: Run, expected: Counter[str]) -> None:
        if not (struck := run.all("struck")):  # the handler took another way this time
            return
        names = {"failure": type(self._failure).__name__, "deadline": "the drain deadline"}
        where = f"at {_short(struck[0])}" if struck[0] else BETWEEN
        what = f"{names.get(kind, kind)} {where}"
        if kind == "SIGTERM":
            self._judge_shutdown(name, run, what)
        ended = run.all("ended")[:1]
        if kind == "deadline" and not any(ended):
            how = "and then returned" if ended else "and went on"
            self._find(name, "cancellation swallowed", f"cancelled by {what}, {how}")
        wanted = Counter({effect: number * len(run.ids) for effect, number in expected.items()})
        more, fewer = run.effects - wanted, wanted - run.effects
        if run.left:
            self._find(name, "lost", f"{what}: the message was not handled again")
        elif reasons := run.all("rejected"):
            broken = "lost" if kind == "failure" else "redelivery fails"
            self._find(name, broken, f"{what}, then a dead letter: {reasons[0]}")
        elif more or fewer:
            shares = {fewer[effect] / number for effect, number in expected.items()}
            whole = len(shares) == 1 and shares.pop().is_integer()
            broken = "effects doubled" if more else "lost" if whole else "half done"
            effect = next(iter(more or fewer))
            times = f"{run.effects[effect]} times, not {wanted[effect]}"
            self._find(name, broken, f"{what}: {effect[:100]} {times}")

    def _judge_shutdown(self, name: str, run: Run, what: str) -> None:
        if run.exit_code == 0:
            return
        ended = run.events("handlers_abandoned", "event_loop_blocked", "close_timed_out")
        stacks = "\n".join(line for one in ended for line in one.get("stacks", [one.get("stack")]))
        lines = re.findall(r"(?:File \"|^ +)([^\"\n]+?\.py)(?:\", line |:)(\d+)", stacks, re.M)
        ours = [f", at {_short(f'{file}:{line}')}" for file, line in lines if is_ours(file)]
        errors = [f"{one.get('step', '')} {one['error']}" for one in run.events("close_failed")]
        kinds: dict[int | None, str] = {
            None: "the process did not end",
            ExitCode.DEADLINE: f"it did not end within {self.settings.drain_seconds:g} s",
        }
        kind = "shutdown ignored" if run.exit_code in kinds else "shutdown fails"
        how = kinds.get(run.exit_code) or [*errors, f"exit code {run.exit_code}"][0]
        self._find(name, kind, f"{what}: {how}{''.join(ours[-1:])}")

    def _find(self, name: str, kind: str, text: str) -> None:
        advice, _, page = ADVICE[kind].rpartition(": ")
        text = " ".join(redacted(text).split())
        new = Finding(name, kind, text, f"{advice}: {DOCS}/{page}", trials=0)
        self.findings.setdefault((name, kind), new).trials += 1


# -- the command


def run_rehearsal(service: "Service", arguments: argparse.Namespace) -> int:
    """Rehearse on the embedded broker and, on request, on the service's own. Returns the exit code."""
    own = [OutgoingMessage(body, one) for one, body in service.examples.items()]
    if not (examples := _read(arguments.messages) if arguments.messages else own):
        where = arguments.messages or "EXAMPLES in handlers/__init__.py"
        raise UsageError(f"rehearse has no messages: {where} is empty")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    os.environ |= {"OTEL_SDK_DISABLED": "true", "TERMINATION_MESSAGE_PATH": os.devnull}
    os.environ.pop("NOTIFY_SOCKET", None)
    began_at, results, urls = time.monotonic(), [], [""]
    if arguments.broker and (settings := service.settings()).broker_scheme != "sqlite":
        urls.append(OPTION.sub("", settings.broker_url.get_secret_value()))
    print(FOR_REAL, file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as directory:
        for url in urls:
            results.append(rehearsal := Rehearsal(service, url, Path(directory), arguments))
            if url:
                print(f"note: temporary queues there: {rehearsal.name}-0, ...", file=sys.stderr)
            rehearsal.run(examples)
    findings = [one for result in results for one in result.findings.values()]
    handlers = results[0].handlers
    longest = max(one.longest_seconds for one in handlers.values())
    report = {
        "service": service.name,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began_at, 1),
        "brokers": [one.settings.broker_scheme for one in results],
        "findings": [asdict(one) for one in findings],
        "handlers": {name: asdict(one) for name, one in handlers.items()},
        "drain_seconds": results[0].settings.drain_seconds,
        "drain_seconds_needed": round(1.5 * longest + 1),
    }
    text = json.dumps(report, indent=2)
    if Path(".template-answers.json").exists():
        Path(".rehearsal.json").write_text(text, encoding="utf-8")  # for `tasks.py fleet`
    print(text if arguments.json else _as_text(report, findings, service.effects))
    return ExitCode.CRASHED if findings else ExitCode.DRAINED


def _as_text(report: dict[str, Any], findings: list[Finding], effects: object) -> str:
    lines = []
    for name, about in report["handlers"].items():
        broken = {one.kind for one in findings if one.handler == name}
        verdict = ", ".join(sorted(broken)) or ("kept" if about["trials"] else "not rehearsed")
        facts = f"trials: {about['trials']}, moments: {about['moments']}, longest: {about['longest_seconds']:.2f} s"
        lines += [f"{name}: {verdict} ({facts})", *(f"    note: {one}" for one in about["hints"])]
    result = f"{len(findings)} broken" if findings else KEPT_ALL
    where = f"seed {report['seed']}, {report['seconds']} s on {' and '.join(report['brokers'])}"
    needed, is_set = report["drain_seconds_needed"], report["drain_seconds"]
    lines += [f"\n{where}: {result}"]
    lines += [f"drain: the longest run needs {needed} s; CONSUMER_DRAIN_SECONDS is {is_set:g}"]
    if effects is None:
        lines += [f"effects: what handlers publish; three lines show more: {DOCS}/testing.md"]
    return "\n".join([*lines, *map(str, findings)])


def _read(file: Path) -> list[OutgoingMessage]:
    """The messages of a file of JSON objects, such as the output of `dead-letters list --body`. Raises UsageError."""
    try:
        lines = re.split(r"\n(?=\{)", file.read_text("utf-8"))
        return [_read_one(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        msg = f'--messages: {file} has no JSON lines like {{"type": "...", "body": ...}}: {error}'
        raise UsageError(msg) from None


def _read_one(one: dict[str, Any]) -> OutgoingMessage:
    if "body_base64" in one:
        body = base64.b64decode(one["body_base64"], validate=True)
    else:
        text = one["body"] if isinstance(one["body"], str) else json.dumps(one["body"])
        body = text.encode()
    message = OutgoingMessage(body, str(one.get("type") or ""), key=str(one.get("key") or ""))
    message.headers = {**one.get("headers", {})}
    return message


async def _on(settings: ConsumerSettings, do: Callable[[Broker], Awaitable[None]]) -> None:
    async with make_source(settings) as source:
        await do(source)


def _made(failure: BaseException | type[BaseException]) -> BaseException:
    try:
        return failure() if isinstance(failure, type) else failure
    except TypeError as error:
        msg = f"FAILURE in handlers/__init__.py cannot be made, so give an instance: {error}"
        raise UsageError(msg) from None


def _be_a_child(work: Callable[[], int | None], output: Path) -> None:
    exit_code: int = ExitCode.CRASHED
    try:
        if sys.platform != "win32":
            os.setpgid(0, 0)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        Thread(target=_end_with_the_rehearsal, daemon=True).start()
        exit_code = work() or 0
        sys.stdout.flush()
    except BaseException as error:
        is_told = isinstance(error, ServiceError)
        note(failed=str(error) if is_told else f"{type(error).__name__}: {error}")
    finally:
        os._exit(exit_code)


def _end_with_the_rehearsal() -> None:  # also when the rehearsal is killed
    parent = parent_process()
    if sys.platform != "win32" and parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _vary(body: bytes, number: int) -> tuple[bytes, dict[str, str]]:
    """A message like the example, whose references and ids end with other digits; and the original of each."""
    varied: dict[str, str] = {}

    def replace(match: re.Match[bytes]) -> bytes:
        before, digits = (one for one in match.groups() if one is not None)
        new = before + b"%0*d" % (len(digits), (int(digits) + number) % 10 ** len(digits))
        varied[new.decode(errors="replace")] = match[0].decode(errors="replace")
        return new

    return VARIED.sub(replace, body), varied


def _parsed(line: bytes) -> dict[str, Any]:
    """A note, or an event of the log; empty for another line."""
    with suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, dict) else {}
    return {}


def _with_type(event: dict[str, Any]) -> str:
    error = str(event.get("reason") or event["error"])
    named = re.search(rf"^[ |]*(\S+: {re.escape(error)})", event.get("exception", ""), re.M)
    return " ".join((named[1] if named else error).split())


def _short(where: str) -> str:
    with suppress(ValueError):
        where = Path(where).relative_to(Path.cwd()).as_posix()
    return where
