"""Writes docs/reference.md from the code: ``python3 tasks.py docs`` runs it before it builds the site.

Settings come from the runtime's pydantic model; commands, exit codes, log events and metrics from its syntax trees,
so that no broker's client need be installed. Only what each log event means is said here.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from runtime.settings import ConsumerSettings

from tools import PACKAGE, ROOT

RUNTIME = PACKAGE / "runtime"
REFERENCE = ROOT / "docs/reference.md"

MEANINGS = {
    "starting": "the settings are valid; next the broker",
    "connected": "the broker is there, also after an outage",
    "consuming": "messages are taken: ready",
    "message_retried": "a handler failed; the message comes back in so many seconds",
    "message_rejected": "the message is a dead letter, for this reason",
    "reconnecting": "the broker is away; once for each outage, and for each attempt at start",
    "reconnect_failed": "another attempt in an outage failed",
    "stop_requested": "a signal asked for the stop",
    "draining": "so many messages are in hand, and have so many seconds",
    "signal_ignored": "a further signal, which changes nothing",
    "forced": "a second SIGINT: what is in hand is cancelled and given back",
    "message_abandoned": "the drain time passed and this message was still in hand; it goes back",
    "handlers_abandoned": "where the handlers were that did not end: their stacks",
    "event_loop_late": "a handler keeps the event loop: it turned so much too late",
    "event_loop_blocked": "the event loop did not turn until the last moment; the process is ended",
    "drained": "the stop is over: what was done since the start",
    "stopped": "the last line, with the exit code",
    "crashed": "an error that is nobody's answer to a message",
    "close_failed": "a step of closing failed or took too long; the next was done all the same",
    "step_done": "a step of closing is done",
    "settlement_lost": "the broker was not told what became of this message: it comes again",
    "lease_lost": "the broker has taken this message for another process",
    "telemetry_lost": "the collector did not take the last export",
    "notify_failed": "systemd could not be told",
    "commit_failed": "offsets were not committed; they are, with the next ones",
    "write_failed": "settlements were not written; they are tried again",
    "partitions_assigned": "the group gave these partitions to this process",
    "partitions_revoked": "the group took partitions away; what was not begun is dropped here",
    "pull_refused": "the server refused a pull, for a limit; the next one comes with the next tick",
    "session_opened": "connected; whether the broker had kept the session",
    "session_lost": "the broker had not kept it: what waited there is gone",
    "session_left": "how the session was left, and how long the broker keeps it",
    "source_failed": "no messages can come any more; the service ends with an error",
    "dead_letter_dropped": "the broker keeps no dead letters, and nobody was subscribed to them",
}
LEVELS = ("debug", "info", "warning", "error")


def main() -> int:
    text = reference()
    if "--check" not in sys.argv:
        REFERENCE.write_text(text, encoding="utf-8", newline="\n")
    elif not REFERENCE.exists() or REFERENCE.read_text(encoding="utf-8") != text:
        print("docs/reference.md is stale: `python3 tasks.py docs` writes it.", file=sys.stderr)
        return 1
    return 0


def reference() -> str:
    return f"""\
# Reference

Written by `python3 tasks.py docs` from the code of the runtime, which is the same in every service. These names are a
contract: they change only with a major version.

## Settings

Environment variables; in development also the file `.env`. A wrong value is one line that names the variable, and exit code 2.

{table(["variable", "default", "may be", "says"], settings())}

## Commands

`order-events` stands for the service.

{table(["command", "does"], commands())}

## Exit codes

{table(["code", "means"], exit_codes())}

## Log events

One line each: JSON with the field `event`, or text with `CONSUMER_LOG_FORMAT=console`. Of any broker:

{table(["event", "level", "fields", "says"], events(of_brokers=False))}

Of some brokers only:

{table(["event", "level", "fields", "says", "broker"], events(of_brokers=True))}

## Metrics

With `telemetry=prometheus`, on `/metrics` of `CONSUMER_PROBE_PORT`:

{table(["metric", "says"], prometheus())}

With `telemetry=opentelemetry`, sent to `OTEL_EXPORTER_OTLP_ENDPOINT`:

{table(["metric", "unit", "says"], opentelemetry())}
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


def settings() -> Iterator[tuple[str, ...]]:
    [model] = (
        node
        for node in tree("settings.py").body
        if isinstance(node, ast.ClassDef) and node.name == ConsumerSettings.__name__
    )
    sayings = {
        ast.unparse(field.target): text_of(saying.value).replace("``", "`")
        for field, saying in zip(model.body, model.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(saying, ast.Expr)
    }
    for name, field in ConsumerSettings.model_fields.items():
        default = "none: must be set" if field.is_required() else code(str(field.default))
        if not field.is_required() and field.default in ("", None):
            default = ""
        yield (
            code(f"CONSUMER_{name}".upper()),
            default,
            allowed(name),
            sayings.get(name, name.replace("_", " ")),
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
    """From the docstring of cli.py, which must speak of every constant."""
    told = re.search(
        r"Exit codes: (.+?)\.\s*$", ast.get_docstring(tree("operate/cli.py")) or "", re.S
    )
    assert told
    meanings = dict(
        re.findall(r"(\d+(?: \+ n)?) (.+)", part)[0]
        for part in re.split(r";\s+", " ".join(told[1].split()))
    )
    constants = {
        str(ast.literal_eval(node.value))
        for name in ("consumer.py", "cli.py")
        for node in tree(name).body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]).startswith("EXIT_")
        and isinstance(node.value, ast.Constant)
    }
    assert constants == {number for number in meanings if "n" not in number}, (
        "cli.py's docstring is stale"
    )
    yield from ((code(number), meaning) for number, meaning in meanings.items())


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
        special = all(
            name.startswith("brokers/") and name != "brokers/source.py" for name in files[event]
        )
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
