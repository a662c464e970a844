"""Writes docs/reference.md from the code: ``python3 tasks.py docs`` runs it before it builds the site.

Settings come from the runtime's pydantic model; commands, exit codes, log events and metrics from its syntax trees,
so that no broker's client need be installed. Only the meaning of each log event is written here.
"""

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from runtime.errors import ExitCode
from runtime.settings import ConsumerSettings
from tools import PACKAGE, ROOT

RUNTIME = PACKAGE / "runtime"
BROKERS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))["broker"]
BROKER_FILES = {f"brokers/{broker}.py" for broker in BROKERS}
REFERENCE = ROOT / "docs/reference.md"

MEANINGS = {
    "starting": "the settings are valid; the service connects to the broker next",
    "connected": "connected to the broker, also after an outage",
    "consuming": "the broker delivers messages: ready",
    "message_retried": "a handler failed; the message is redelivered after this delay",
    "message_rejected": "the message became a dead letter, for this reason",
    "reconnecting": "the broker cannot be reached; once for each outage, and for each attempt at start",
    "reconnect_failed": "another attempt in an outage failed",
    "stop_requested": "a signal requested the graceful shutdown",
    "draining": "the number of in-flight messages, and the seconds that they have",
    "signal_ignored": "a further signal, which changes nothing",
    "forced": "a second SIGINT: in-flight messages are cancelled and requeued",
    "message_abandoned": "the drain time passed and this message was still in flight; it is requeued",
    "handlers_abandoned": "the stacks of the handlers that did not end",
    "event_loop_late": "a handler blocks the event loop, for this long",
    "event_loop_blocked": "the event loop was blocked until the limit; the process is ended",
    "close_timed_out": "closing took longer than its limit while the event loop ran; the process is ended",
    "drained": "the graceful shutdown is complete; the counts are since the start",
    "stopped": "the last line, with the exit code",
    "crashed": "an error that ends the service",
    "close_failed": "a step of closing failed or took too long; the next steps were done",
    "step_done": "a step of closing is done",
    "settlement_lost": "the broker did not get this settlement: it delivers the message again",
    "few_deliveries": "the redrive policy of an existing queue allows few deliveries, of which restarts are some",
    "lease_lost": "the lease expired, and the broker redelivered this message to another process",
    "telemetry_lost": "the collector did not accept the last export",
    "notify_failed": "the notification to systemd failed",
    "commit_failed": "offsets were not committed; the next commit includes them",
    "write_failed": "settlements were not written; they are tried again",
    "partitions_assigned": "the group assigned these partitions to this process",
    "partitions_revoked": "the group revoked partitions; their messages that no handler has started are dropped here",
    "messages_trimmed": "messages were deleted from the stream or topic before the group read them: they are lost",
    "partition_restarted": "the topic was created again, or has lost its end; reading goes on from its beginning",
    "postpone_failed": "a retry with a long delay was not stored yet; another attempt follows",
    "max_ack_pending": "the limit of the consumer is small for messages that wait for a retry",
    "pull_refused": "the server refused a pull because of a limit; the next one follows",
    "session_opened": "connected; whether the broker had kept the session",
    "session_lost": "the broker had not kept the session: the messages in it are lost",
    "session_left": "how the session was left, and how long the broker keeps it",
    "source_failed": "no more messages can be delivered; the service ends with an error",
    "dead_letter_dropped": "the broker stores no dead letters, and there was no subscriber to them",
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

Written by `python3 tasks.py docs` from the code of the runtime, which is the same in every service. These names are a
contract: they change only with a major version.

## Settings

Environment variables; in development also the file `.env`. An invalid value is reported in one line that names the variable,
with exit code 2.

{table(["variable", "default", "allowed", "meaning"], settings())}

## Commands

`order-events` stands for the name of the service.

{table(["command", "does"], commands())}

## Exit codes

{table(["code", "meaning"], exit_codes())}

## Log events

One line each: JSON with the field `event`, or text with `CONSUMER_LOG_FORMAT=console`. With every broker:

{table(["event", "level", "fields", "meaning"], events(of_brokers=False))}

With some brokers only:

{table(["event", "level", "fields", "meaning", "broker"], events(of_brokers=True))}

## Metrics

With `telemetry=prometheus`, on `/metrics` of `CONSUMER_PROBE_PORT`:

{table(["metric", "meaning"], prometheus())}

With `telemetry=opentelemetry`, sent to `OTEL_EXPORTER_OTLP_ENDPOINT`:

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
    """Each call of a method, with what it is called on and its name."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            yield call, ast.unparse(call.func.value), call.func.attr


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
        yield (
            code(f"CONSUMER_{name}".upper()),
            default,
            allowed(name),
            docstrings.get(name, name.replace("_", " ")),
        )


def allowed(name: str) -> str:
    """The type and the bounds, as the model's own JSON schema has them."""
    schema = ConsumerSettings.model_json_schema()["properties"][name]
    schema = next((one for one in schema.get("anyOf", []) if one["type"] != "null"), schema)
    if "enum" in schema:
        return ", ".join(map(code, schema["enum"]))
    kind = {"integer": "whole number", "number": "number", "string": "text"}[schema["type"]]
    bounds = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "maxLength": "at most {} characters",
    }
    said = [words.format(schema[bound]) for bound, words in bounds.items() if bound in schema]
    return ", ".join([kind, *said])


def commands() -> Iterator[tuple[str, ...]]:
    parents = {"commands": "order-events", "actions": "order-events dead-letters"}
    for call, on, method in calls(tree("operate/cli.py")):
        if method == "add_parser":
            [sentence] = (text_of(word.value) for word in call.keywords if word.arg == "help")
            yield code(f"{parents[on]} {text_of(call.args[0])}"), sentence


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
                fields[event] |= {str(word.arg) for word in call.keywords if word.arg != "exc_info"}
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


def prometheus() -> Iterator[tuple[str, ...]]:
    for call in ast.walk(tree("telemetry/prometheus.py")):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("MetricFamily"):
            name, says = (text_of(argument) for argument in call.args[:2])
            labels = [word.value for word in call.keywords if word.arg == "labels"]
            label = f"{{{','.join(ast.literal_eval(labels[0]))}}}" if labels else ""
            kind = ast.unparse(call.func).removesuffix("MetricFamily").lower()
            total = "_total" if kind == "counter" else ""
            yield code(f"{name}{total}{label}"), f"{says.rstrip('.')} ({kind})"


def opentelemetry() -> Iterator[tuple[str, ...]]:
    for call, _, method in calls(tree("telemetry/opentelemetry.py")):
        if method.startswith("create_"):
            name, unit, says = (
                text_of(argument) for argument in call.args if isinstance(argument, ast.Constant)
            )
            kind = method.removeprefix("create_").removeprefix("observable_").replace("_", "-")
            yield code(name), code(unit), f"{says.rstrip('.')} ({kind})"


if __name__ == "__main__":
    sys.exit(main())
