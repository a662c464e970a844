"""The Jinja filters of this template, and the validation of every answer.

Cookiecutter imports this file when it asks its questions. Answers are validated there, before any file is
written. The pre_gen hook validates again, because `--replay` skips the questions.
"""

import json
import keyword
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.ext import Extension

LONGEST_TEXT = 100
LONGEST_NAME = 40
JINJA = re.compile(r"\{\{|\{%|\{#")
WINDOWS_DEVICES = re.compile(
    r"con|prn|aux|nul|(com|lpt)[0-9]"
)  # Windows reserves these as file names, with any extension
TEMPLATE = Path(__file__).resolve().parent


class ConsumerTemplate(Extension):
    """Adds the filters, and prevents cookiecutter from evaluating an answer as a Jinja template."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        filters: list[Callable[..., Any]] = [
            check_answers,
            escaped,
            handler_classes,
            handler_names,
            markdown,
            public_answers,
            refusal,
            template_commit,
        ]
        environment.filters.update({function.__name__: function for function in filters})
        questions = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
        hooks = [path.read_text(encoding="utf-8") for path in (TEMPLATE / "hooks").glob("*.py")]
        self.own_sources = {*map(str, questions.values()), *hooks}

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        # Cookiecutter renders answers from its command line: `description={{ 7*7 }}` would become 49, and
        # worse could run. Files have a name here. Among texts without a name, only this template's own
        # questions, hooks and paths may be evaluated.
        is_path = not JINJA.search(re.sub(r"\{\{cookiecutter\.\w+\}\}", "", source))
        if name is None and not is_path and source not in self.own_sources:
            sys.exit(f"the answer {_shown(source)} must not contain {{{{, {{% or {{#.")
        return source


def handler_names(answer: str) -> list[str]:
    """``"Order created, refund-paid, OrderSent"`` becomes order_created, refund_paid, order_sent."""
    words_apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", answer)
    names = [re.sub("_+", "_", name).strip("_").lower() for name in words_apart.split(",")]
    return [name for name in names if name]


def class_name(name: str) -> str:
    """``order_created`` becomes OrderCreated."""
    return "".join(word.capitalize() for word in name.split("_"))


def handler_classes(answer: str) -> dict[str, str]:
    """Handler name to model class name."""
    return {name: class_name(name) for name in handler_names(answer)}


def public_answers(answers: Mapping[str, Any]) -> dict[str, str]:
    """The user's answers, without the template's private data."""
    return {name: answer for name, answer in answers.items() if not name.startswith("_")}


def template_commit(_answers: Mapping[str, Any]) -> str:
    """The commit of this template; empty if it is not a clone. Does not need git to be installed."""
    try:
        head = (TEMPLATE / ".git/HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (loose := TEMPLATE / ".git" / name).exists():
            return loose.read_text(encoding="utf-8").strip()
        packed = (TEMPLATE / ".git/packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")


def escaped(text: str) -> str:
    """The text, escaped for a quoted TOML string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def markdown(text: str) -> str:
    """The text, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", text)


def check_answers(answers: Mapping[str, Any]) -> str:
    """Exits with one sentence on standard error if an answer is refused."""
    if reason := refusal(answers):
        sys.exit(reason)
    return "checked"


def refusal(answers: Mapping[str, Any]) -> str:
    """One sentence that names the refused answer and the reason; empty if all answers are accepted."""
    return next(_refusals(answers), "")


def _refusals(answers: Mapping[str, Any]) -> Iterator[str]:
    for question, answer in public_answers(answers).items():
        if not answer.strip():
            yield f"{question} is empty."
        if not answer.isprintable():
            yield f"{question} {_shown(answer)} must be one line of printable characters."
        if JINJA.search(answer):
            yield f"{question} {_shown(answer)} must not contain {{{{, {{% or {{#."
    for question in ("project_name", "description"):
        if len(answers[question]) > LONGEST_TEXT:
            yield f"{question} {_shown(answers[question])} is longer than {LONGEST_TEXT} characters."

    slug, package = answers["project_slug"], answers["package_name"]
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", slug):
        yield f"project_slug {_shown(slug)} must consist of lowercase letters a-z, digits and dashes, and start with a letter."
    if not re.fullmatch(r"[a-z][a-z0-9_]*", package):
        yield (
            f"package_name {_shown(package)} must consist of lowercase letters a-z, digits and"
            " underscores, and start with a letter."
        )
    for question, name in (("project_slug", slug), ("package_name", package)):
        yield from _name_refusals(question, name)
        if name.replace("-", "_") in answers["_taken_names"]:
            yield f"{question} {_shown(name)} conflicts with a dependency or a reserved name."
    if package in sys.stdlib_module_names:
        yield f"package_name {_shown(package)} conflicts with a module of the standard library."

    names = handler_names(answers["handlers"])
    if not names:
        yield f"handlers {_shown(answers['handlers'])} contains no name."
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            yield (
                f"handlers: {_shown(name)} must consist of letters a-z, digits and underscores, and start"
                " with a letter."
            )
        yield from _name_refusals("handlers:", name)
        if keyword.iskeyword(class_name(name)):
            yield f"handlers: {_shown(name)} would need a class named {class_name(name)}, which is a Python keyword."
        if name in answers["_taken_handlers"]:
            yield f"handlers: {_shown(name)} is reserved: the generated handler files use that name."
        if names.count(name) > 1:
            yield f"handlers: {_shown(name)} appears more than once."


def _name_refusals(question: str, name: str) -> Iterator[str]:
    if len(name) > LONGEST_NAME:
        yield f"{question} {_shown(name)} is longer than {LONGEST_NAME} characters."
    if keyword.iskeyword(name):
        yield f"{question} {_shown(name)} is a Python keyword."
    if WINDOWS_DEVICES.fullmatch(name):
        yield f"{question} {_shown(name)} is a reserved device name on Windows."


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= 60 else f"{answer[:60]}...")
