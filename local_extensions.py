"""The Jinja filters of this template, and the validation of every answer.

Cookiecutter imports this file when it asks its questions. It validates each answer right after it was typed, and all
answers before any file is written. The pre_gen hook validates again, because `--replay` skips the
questions. Names of handlers are checked by the service's own tools/new_handler.py.
"""

from __future__ import annotations

import json
import keyword
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cookiecutter
from jinja2 import Environment
from jinja2.ext import Extension

if sys.version_info < (3, 10):  # noqa: UP036  # of cookiecutter's Python, which the user chose
    sys.exit("This template needs Python 3.10 or later to be rendered: try `uvx cookiecutter`.")
if tuple(map(int, cookiecutter.__version__.split(".")[:2])) < (2, 1):
    sys.exit("This template needs cookiecutter 2.1 or later: try `uvx cookiecutter`.")

LONGEST_TEXT = 100
LONGEST_NAME = 40
JINJA = re.compile(r"\{\{|\{%|\{#")
WINDOWS_DEVICES = re.compile(
    r"con|prn|aux|nul|(com|lpt)[0-9]"
)  # Windows reserves these as file names, with any extension
TEMPLATE = Path(__file__).resolve().parent
QUESTIONS: dict[str, Any] = json.loads((TEMPLATE / "cookiecutter.json").read_text(encoding="utf-8"))
WEB = ("http:", "https:", "git:", "ssh:", "file:")
KNOWN_ANYWHERE = ("gh:", "gl:", "bb:", *WEB, *(f"git+{scheme}" for scheme in WEB))
NEW_HANDLER = runpy.run_path(str(TEMPLATE / "{{cookiecutter.project_slug}}/tools/new_handler.py"))


class ConsumerTemplate(Extension):
    """Adds the filters, and prevents cookiecutter from evaluating an answer as a Jinja template."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        filters: list[Callable[..., Any]] = [
            check_answers,
            escaped,
            handler_types,
            markdown,
            model_name,
            origin,
            public_answers,
            record,
            refusal,
        ]
        environment.filters.update({function.__name__: function for function in filters})
        hooks = [path.read_text(encoding="utf-8") for path in (_template() / "hooks").glob("*.py")]
        self.own_sources = {*map(str, _questions().values()), *hooks}

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        # Cookiecutter renders answers from its command line: `description={{ 7*7 }}` would become 49, and
        # worse could run. Files have a name here. Among texts without a name, only this template's own
        # questions, hooks and paths may be evaluated.
        is_path = not JINJA.search(re.sub(r"\{\{cookiecutter\.\w+\}\}", "", source))
        if name is None and not is_path and source not in self.own_sources:
            sys.exit(f"the answer {_shown(source)} must not contain {{{{, {{% or {{#.")
        return source


def _template() -> Path:
    """The folder of the version that is rendered: cruft renders two in one process, which imports this file once."""
    names = ("cookiecutter.json", "local_extensions.py")
    for folder in map(Path, reversed(sys.path)):
        if all((folder / name).is_file() for name in names):
            return folder.resolve()
    return TEMPLATE


def _questions() -> dict[str, Any]:
    text = (_template() / "cookiecutter.json").read_text(encoding="utf-8")
    questions: dict[str, Any] = json.loads(text)
    return questions


def handler_types(answer: str) -> dict[str, str]:
    """Each message type, as it was typed, by the name of its handler's files.

    ``"OrderCreated, refund-paid"`` becomes ``{"order_created": "OrderCreated", "refund_paid": "refund-paid"}``.
    """
    types: dict[str, str] = {}
    for message_type in filter(None, (" ".join(one.split()) for one in answer.split(","))):
        name = NEW_HANDLER["name_of"](message_type)
        if name in types:
            name = NEW_HANDLER["name_of"](message_type, with_version=True)
        types[name] = message_type
    return types


def model_name(name: str) -> str:
    """``order_created`` becomes OrderCreated."""
    return str(NEW_HANDLER["class_name"](name))


def public_answers(answers: Mapping[str, Any]) -> dict[str, str]:
    """The user's answers, without the template's private data."""
    return {name: answer for name, answer in answers.items() if not name.startswith("_")}


def record(answers: Mapping[str, Any]) -> str:
    """The answers as JSON; the same text with every cookiecutter."""
    return json.dumps(public_answers(answers), indent=2, sort_keys=True)


def origin(answers: Mapping[str, Any]) -> dict[str, str]:
    """The origin of this template, for its next version: its place, the folder in its repository, and the commit."""
    template = _template()
    folders = (template, *template.parents)
    root = next((folder for folder in folders if (folder / ".git").exists()), template)
    place: str = answers["_template"]
    prefix, colon, _ = place.partition(":")
    if not colon and not place.lower().endswith(".zip"):
        place = str(root)  # a relative path would mean another folder elsewhere
    elif "/" not in prefix and f"{prefix}:" not in KNOWN_ANYWHERE and "@" not in prefix:
        place = _remote(root) or place  # place may be an abbreviation in this user's settings
    directory = template.relative_to(root).as_posix()
    return {
        "place": place,
        "directory": "" if directory == "." else directory,
        "commit": _commit(root / ".git"),
    }


def _remote(root: Path) -> str:
    try:
        config = (root / ".git/config").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r'^\[remote "origin"\]\n(?:\s.*\n)*?\s+url = (.+)$', config, re.M)
    url = found[1] if found else ""
    return (
        f"git+{url}" if "://" in url else url
    )  # otherwise cookiecutter guesses by the word `git` in it


def _commit(git: Path) -> str:
    """HEAD of this repository; empty if it is no repository. Does not need git to be installed."""
    try:
        if git.is_file():  # in a worktree or a submodule
            git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir: ").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (git / "commondir").exists():
            git /= (git / "commondir").read_text(encoding="utf-8").strip()
        if (loose := git / name).exists():
            return loose.read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
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
    """Exits with one sentence for each refused answer among those that were given so far.

    Cookiecutter asks for the variables in their order, and calls this after each typed answer, and at the end.
    """
    if "ci" not in answers and "--no-input" in sys.argv:
        return "not yet"  # nobody types: the end names all faults at once
    if reason := refusal(answers):
        sys.exit(f"{reason}{_again(answers)}")
    return "checked"


def _again(answers: Mapping[str, Any]) -> str:
    """The command that repeats the other answers; empty if they were not typed."""
    program, *arguments = sys.argv
    if "--no-input" in arguments or "cookiecutter" not in Path(program).parts[-2:]:
        return ""
    refused = {question for question, _ in _refusals(answers)}
    given = {
        question: answer
        for question, answer in public_answers(answers).items()
        if question not in refused and answer != QUESTIONS[question]
    }
    options = [one for one in arguments if one.partition("=")[0] not in answers]
    words = ["cookiecutter", *options, *(f"{question}={given[question]}" for question in given)]
    return f"\nThis command repeats the other answers:\n    {shlex.join(words)}"


PUBLIC = [question for question in QUESTIONS if not question.startswith("_")]


def refusal(answers: Mapping[str, Any]) -> str:
    """One sentence for each refused answer, which names it and the reason; empty if all are accepted."""
    return "\n".join(dict.fromkeys(sentence for _, sentence in _refusals(answers)))


def _refusals(answers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each refused question, and its sentence."""
    questions = _questions()
    for name in answers.keys() & questions.keys() - set(PUBLIC):
        if not name.startswith("__") and answers[name] != questions[name]:
            version = answers.get("_template_version")
            yield (
                "_template_version",
                f"these answers are of another version of the template ({version}, where this is"
                f" {questions['_template_version']}): give the answers without the names that begin with `_`.",
            )
    refused: set[str] = set()
    for question in PUBLIC:
        if question not in answers or (question == "package_name" and _follows(answers, refused)):
            continue
        reasons = [*_refusals_of(question, answers[question])]
        refused |= {question} if reasons else set()
        for reason in reasons if question == "handlers" else reasons[:1]:
            yield question, reason


def _follows(answers: Mapping[str, Any], refused: set[str]) -> bool:
    """Whether the package's name is the default, from a slug that is refused already."""
    derived = str(answers["project_slug"]).replace("-", "_")
    return "project_slug" in refused and answers["package_name"] == derived


def _refusals_of(question: str, answer: str) -> Iterator[str]:
    if not isinstance(answer, str):
        yield f"{question} must be text."
        return
    if not answer.strip():
        yield f"{question} is empty."
    elif not answer.isprintable():
        yield f"{question} {_shown(answer)} must be one line of printable characters."
    elif JINJA.search(answer):
        yield f"{question} {_shown(answer)} must not contain {{{{, {{% or {{#."
    elif question == "handlers":
        yield from _handler_refusals(answer)
    if question in ("project_name", "description") and len(answer) > LONGEST_TEXT:
        yield f"{question} {_shown(answer)} is longer than {LONGEST_TEXT} characters."
    if question == "project_slug" and not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", answer):
        yield (
            f"project_slug {_shown(answer)} must consist of lowercase letters a-z, digits and dashes, and start"
            " with a letter."
        )
    if question == "package_name":
        if not re.fullmatch(r"[a-z][a-z0-9_]*", answer):
            yield (
                f"package_name {_shown(answer)} must consist of lowercase letters a-z, digits and"
                " underscores, and start with a letter."
            )
        if answer in sys.stdlib_module_names:
            yield f"package_name {_shown(answer)} conflicts with a module of the standard library."
    if question in ("project_slug", "package_name"):
        yield from _name_refusals(question, answer)


def _handler_refusals(answer: str) -> Iterator[str]:
    types = handler_types(answer)
    if not types:
        yield f"handlers {_shown(answer)} contains no name."
    for name, message_type in types.items():
        if reason := NEW_HANDLER["refusal"](message_type, name, QUESTIONS["_taken_handlers"]):
            yield f"handlers: {reason}."
    if len(types) < len([one for one in answer.split(",") if one.strip()]):
        yield f"handlers {_shown(answer)} contains a type more than once, or two that differ only in their spelling."


def _name_refusals(question: str, name: str) -> Iterator[str]:
    if len(name) > LONGEST_NAME:
        yield f"{question} {_shown(name)} is longer than {LONGEST_NAME} characters."
    if keyword.iskeyword(name):
        yield f"{question} {_shown(name)} is a Python keyword."
    if WINDOWS_DEVICES.fullmatch(name):
        yield f"{question} {_shown(name)} is a reserved device name on Windows."
    if name.replace("-", "_") in QUESTIONS["_taken_names"]:
        yield f"{question} {_shown(name)} conflicts with a dependency or a reserved name."


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= 60 else f"{answer[:60]}...")
