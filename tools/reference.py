"""Writes docs/reference.md from the code: ``python3 tasks.py docs`` runs it before it builds the site.

Settings and most metrics come from the runtime itself; commands, exit codes, log events and histograms from its syntax
trees, so that neither a broker's client nor OpenTelemetry need be installed. Only the meaning of each log event is written here.
"""

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runtime.errors import ExitCode
from runtime.settings import ConsumerSettings
from runtime.telemetry import Reading, Telemetry
from tools import PACKAGE, ROOT

RUNTIME = PACKAGE / "runtime"
BROKERS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))["broker"]
BROKER_FILES = {f"brokers/{broker}.py" for broker in BROKERS}
REFERENCE = ROOT / "docs/reference.md"

MEANINGS = {
    "starting": "the settings are valid; the service connects to the broker next",
    "connected": "connected to the broker, also after an outage",
    "consuming": "the broker delivers messages: ready",
    "handling": "the handler of this message starts",
    "message_retried": "a handler failed; the message is redelivered after this delay; during a pause, no attempt is counted",
    "paused": "many messages failed in a row, or a handler raised `Pause`: after these seconds, one message is tried",
    "resumed": "a message has succeeded after these seconds: the service takes all messages again",
    "message_rejected": "the message became a dead letter, for this reason",
    "handler_overrun": "a handler has exceeded its time limit and cannot be cancelled: it runs in a thread, or swallows its cancellation; it keeps its slot until it ends",
    "reconnecting": "the broker cannot be reached, or refuses the login; logged at once, and then once a minute with the duration of the outage",
    "reconnect_failed": "another connection attempt failed during an outage",
    "stop_requested": "a signal requested the graceful shutdown",
    "draining": "the graceful shutdown begins, with this number of in-flight messages and these seconds left",
    "signal_ignored": "a further signal, which has no effect",
    "forced": "a second SIGINT: in-flight messages are cancelled and requeued",
    "message_abandoned": "the drain time passed and this message was still in flight; it is requeued",
    "handlers_abandoned": "the stacks of the handlers that did not finish",
    "event_loop_late": "a handler blocks the event loop, for this long",
    "event_loop_blocked": "the event loop was blocked until the limit; the watchdog ends the process",
    "close_timed_out": "closing exceeded its limit while the event loop ran; the watchdog ends the process",
    "drained": "the graceful shutdown is complete; the counts are since the start",
    "stopped": "the last line, the receipt of the shutdown: see [its page](shutdown.md#the-receipt)",
    "start_failed": "the service could not start, for this reason",
    "crashed": "the service exits because of this error",
    "close_failed": "a step of closing failed or took too long; the next steps were done",
    "step_done": "a step of closing is done",
    "settlement_lost": "the broker did not get this settlement: it delivers the message again",
    "few_deliveries": "the redrive policy of an existing queue allows few deliveries, and restarts count as deliveries",
    "lease_lost": "the lease expired, and the broker redelivered this message to another process",
    "export_failed": "the collector did not accept an export; logged at once, and then once a minute with the duration",
    "accept_failed": "the probe port accepts no connection, because no file descriptor is free; logged once a minute",
    "telemetry_lost": "the collector did not accept the last export",
    "notify_failed": "the notification to systemd failed",
    "commit_failed": "offsets were not committed; the next commit includes them",
    "write_failed": "settlements were not written; they are written again later",
    "partitions_assigned": "the group assigned these partitions to this process",
    "partitions_revoked": "the group revoked partitions; their buffered messages are dropped in this process",
    "messages_trimmed": "messages were deleted from the stream or topic before the group read them: they are lost",
    "partition_restarted": "the topic was created again, or its last records are missing; the partition is read from its start",
    "postpone_failed": "a retry with a long delay was not stored yet; another attempt follows",
    "max_ack_pending": "the consumer's limit is small, and messages that wait for a retry count towards it",
    "pull_refused": "the server refused a pull because of a limit; the next pull follows",
    "session_opened": "connected; `resumed` says whether the broker kept the session",
    "session_lost": "the broker did not keep the session: the messages in it are lost",
    "session_left": "the process left its session with this number of unstarted messages; the broker keeps it for these seconds",
    "source_failed": "no more messages can be delivered; the service exits with an error",
    "dead_letter_dropped": "the broker stores no dead letters, and the topic had no subscriber",
    "properties_dropped": "the client library cannot read a message's properties; it is delivered without them",
}
LEVELS = ("debug", "info", "warning", "error")


def main() -> int:
    text = reference()
    if "--check" not in sys.argv:
        REFERENCE.write_text(text, encoding="utf-8", newline="\n")
    elif not REFERENCE.exists() or REFERENCE.read_text(encoding="utf-8") != text:
        print(
            "docs/reference.md is out of date: `python3 tasks.py docs` writes it.", file=sys.stderr
        )
        return 1
    return 0


def reference() -> str:
    return f"""\
# Reference

`python3 tasks.py docs` writes this page from the code of the runtime, which is the same in every service. These names
change only with a major version.

## Settings

Settings are environment variables, in development also the file `.env`. An invalid value is reported in one line that names the variable,
with exit code 2.

{table(["variable", "default", "allowed", "meaning"], settings())}

## Commands

`order-events` stands for the name of the service.

{table(["command", "does"], commands())}

## Exit codes

{table(["code", "meaning"], exit_codes())}

## Log events

Each event is one line: JSON with the field `event`, or text with `CONSUMER_LOG_FORMAT=console`. Events of every broker:

{table(["event", "level", "fields", "meaning"], events(of_brokers=False))}

Events of some brokers:

{table(["event", "level", "fields", "meaning", "broker"], events(of_brokers=True))}

## Metrics

`/metrics` of `CONSUMER_PROBE_PORT` has, with `telemetry=prometheus` or `both`:

{table(["metric", "meaning"], prometheus())}

`OTEL_EXPORTER_OTLP_ENDPOINT` gets, with `telemetry=opentelemetry` or `both`:

{table(["metric", "unit", "meaning"], opentelemetry())}
"""


def table(heads: list[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def tree(name: str) -> ast.Module:
    return ast.parse((RUNTIME / name).read_text(encoding="utf-8"))


def calls(node: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Each call of a method, with the object and the method's name; both for ``(a.x if ... else a.y)()``."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            function = call.func
            for called in (
                (function.body, function.orelse) if isinstance(function, ast.IfExp) else (function,)
            ):
                if isinstance(called, ast.Attribute):
                    yield call, ast.unparse(called.value), called.attr


def text_of(node: ast.expr) -> str:
    value = ast.literal_eval(node)
    assert isinstance(value, str), ast.unparse(node)
    return value


def code(text: str) -> str:
    return f"`{text}`"


def field_docstrings(file: str, class_name: str) -> dict[str, str]:
    """The text below each field of a class; a field may have none."""
    [body] = (
        node.body
        for node in tree(file).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    found = {}
    for field, docstring in pairwise(body):
        if isinstance(field, ast.AnnAssign | ast.Assign) and isinstance(docstring, ast.Expr):
            name = field.target if isinstance(field, ast.AnnAssign) else field.targets[0]
            found[ast.unparse(name)] = text_of(docstring.value).replace("``", "`")
    return found


def settings() -> Iterator[tuple[str, ...]]:
    docstrings = field_docstrings("settings.py", ConsumerSettings.__name__)
    for name, field in ConsumerSettings.model_fields.items():
        default = "none: must be set" if field.is_required() else code(str(field.default))
        if not field.is_required() and field.default in ("", None):
            default = ""
        if isinstance(field.default, bool):
            default = code("yes" if field.default else "no")
        if isinstance(field.default, tuple):
            default = f"{len(field.default)} from {field.default[0]} to {field.default[-1]}"
        yield (
            code(f"CONSUMER_{name}".upper()),
            default,
            allowed(name),
            docstrings.get(name, name.replace("_", " ")),
        )


def allowed(name: str) -> str:
    """The type and the bounds, from the model's own JSON schema."""
    schema = ConsumerSettings.model_json_schema()["properties"][name]
    schema = next((one for one in schema.get("anyOf", []) if one["type"] != "null"), schema)
    schema = schema.get("items", schema)
    if "enum" in schema:
        return ", ".join(map(code, schema["enum"]))
    kind = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "yes or no",
    }[schema["type"]]
    bounds = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "maxLength": "at most {} characters",
    }
    said = [words.format(schema[bound]) for bound, words in bounds.items() if bound in schema]
    return ", ".join([kind, *said])


def commands() -> Iterator[tuple[str, ...]]:
    yield code("order-events --version"), "print the versions of the service and the template"
    texts: dict[str, ast.expr] = {}
    for node in ast.walk(tree("operate/cli.py")):
        match node:
            case ast.Assign([ast.Name(name)], value):
                texts[name] = value
            case ast.Call(ast.Name("add"), [name, _, sentence, *group]):
                parent = "order-events dead-letters" if group else "order-events"
                yield code(f"{parent} {text_of(name)}"), text_of(resolved(sentence, texts))
            case ast.Call(ast.Attribute(attr="add_parser"), [ast.Constant() as name], [help]):
                yield code(f"order-events {text_of(name)}"), text_of(resolved(help.value, texts))


def resolved(node: ast.expr, texts: dict[str, ast.expr]) -> ast.expr:
    """The value that was assigned to the name, if it is a name."""
    return texts.get(ast.unparse(node), node)


def exit_codes() -> Iterator[tuple[str, ...]]:
    meanings = field_docstrings("errors.py", ExitCode.__name__)
    for exit_code in ExitCode:
        yield code(str(int(exit_code))), meanings[exit_code.name].rstrip(".")
    yield code("128 + n"), "Ended by signal n, or forced by it during the drain"


def events(of_brokers: bool) -> Iterator[tuple[str, ...]]:
    levels: dict[str, set[str]] = defaultdict(set)
    fields: dict[str, set[str]] = defaultdict(set)
    files: dict[str, set[str]] = defaultdict(set)
    for path in sorted(RUNTIME.rglob("*.py")):
        name = path.relative_to(RUNTIME).as_posix()
        for call, on, level in calls(tree(name)):
            if on == "log" and level in LEVELS:
                event = text_of(call.args[0])
                levels[event].add(level)
                fields[event] |= {
                    word.arg for word in call.keywords if word.arg not in (None, "exc_info")
                }
                files[event].add(name)
    assert MEANINGS.keys() == levels.keys(), MEANINGS.keys() ^ levels.keys()
    for event, meaning in MEANINGS.items():
        special = files[event] <= BROKER_FILES
        row = (
            code(event),
            ", ".join(sorted(levels[event], key=LEVELS.index)),
            ", ".join(sorted(fields[event])),
            meaning,
        )
        if special and of_brokers:
            yield *row, ", ".join(sorted(Path(name).stem for name in files[event]))
        elif not special and not of_brokers:
            yield row


def readings() -> Iterator[Reading]:
    """The metrics of both kinds of telemetry, before a consumer runs."""
    settings = ConsumerSettings.model_validate({"broker_url": "sqlite:///"})
    idle: Any = SimpleNamespace(
        settings=settings,
        state="starting",
        in_flight={},
        abandoned=(),
        breaker=SimpleNamespace(reason=""),
        source=SimpleNamespace(parts=[], connected=False),
        event=SimpleNamespace(set_at=None),
    )
    yield from Telemetry().readings(idle)


def meaning_of(reading: Reading) -> str:
    kind = "counter" if reading.kind == "counter" else "gauge"
    return f"{reading.meaning.rstrip('.')} ({kind})"


def name_in_prometheus(reading: Reading) -> str:
    ends = {"seconds": "_seconds", "counter": "_total", "gauge": ""}
    return f"consumer_{reading.name.replace('.', '_')}{ends[reading.kind]}"


def prometheus() -> Iterator[tuple[str, ...]]:
    for reading in readings():
        label = f"{{{','.join(reading.labels)}}}" if reading.labels else ""
        yield code(f"{name_in_prometheus(reading)}{label}"), meaning_of(reading)
    yield code("consumer_message_duration_seconds{handler}"), meaning_in_prometheus("DURATION")
    yield code("consumer_message_queue_seconds"), meaning_in_prometheus("QUEUE")


def meaning_in_prometheus(name: str) -> str:
    [meaning] = (
        text_of(node.value)
        for node in tree("telemetry/prometheus.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return f"{meaning.rstrip('.')} (histogram)"


def opentelemetry() -> Iterator[tuple[str, ...]]:
    for call, _, method in calls(tree("telemetry/opentelemetry.py")):
        if method.startswith("create_") and isinstance(call.args[0], ast.Constant):
            name, unit, says = (
                text_of(argument) for argument in call.args if isinstance(argument, ast.Constant)
            )
            kind = method.removeprefix("create_").removeprefix("observable_").replace("_", "-")
            yield code(name), code(unit), f"{says.rstrip('.')} ({kind})"
    for reading in readings():
        unit = code("s") if reading.kind == "seconds" else ""
        yield code(f"consumer.{reading.name}"), unit, meaning_of(reading)


if __name__ == "__main__":
    sys.exit(main())
