"""The renders of the tests: every combination of answers, and a rendered service to inspect and to run."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import combinations, cycle, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML

from tasks import COMMANDS, PYTHON_PATH, requirements

TEMPLATE = Path(__file__).resolve().parents[2]
TREE = TEMPLATE / "{{cookiecutter.project_slug}}"
QUESTIONS: dict[str, Any] = json.loads((TEMPLATE / "cookiecutter.json").read_text("utf-8"))
PUBLIC_QUESTIONS = [name for name in QUESTIONS if not name.startswith("_")]
ENVIRONMENTS = TEMPLATE / ".cache/environments"
CACHES = {"__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}

LONG_NAME = "order_events_" * 3 + "x"  # 40 characters, the longest name
NAMES = {
    "short": {"project_slug": "order-events", "package_name": "order_events"},
    "long": {"project_slug": LONG_NAME.replace("_", "-"), "package_name": LONG_NAME},
}
HANDLERS = {
    ("two", "short"): ["order_created", "payment_received"],
    ("one", "long"): ["order_created_" * 2 + "order_create"],
}


CHOICES: dict[str, list[str]] = {
    name: answers
    for name, answers in QUESTIONS.items()
    if isinstance(answers, list) and name[0] != "_"
}
"""The questions that offer a list of answers."""


@dataclass(frozen=True)
class Combination:
    """One set of answers: to each question of `CHOICES`, and of typed answers the keys in `NAMES` and `HANDLERS`."""

    chosen: dict[str, str]
    handlers: str
    names: str

    def __getitem__(self, question: str) -> str:
        return self.chosen[question]

    @property
    def handler_names(self) -> list[str]:
        return HANDLERS[self.handlers, self.names]

    @property
    def answers(self) -> dict[str, str]:
        return {**NAMES[self.names], **self.chosen, "handlers": ", ".join(self.handler_names)}

    def __str__(self) -> str:
        answers = {**self.chosen, "handlers": self.handlers, "names": self.names}
        return "-".join(f"{question}={answer}" for question, answer in answers.items())


def every_choice(questions: Collection[str]) -> list[dict[str, str]]:
    """The product of the answers to these questions; the last question varies first."""
    answers = product(*(CHOICES[question] for question in questions))
    return [dict(zip(questions, one, strict=True)) for one in answers]


def spread() -> list[Combination]:
    """Every handler stub of every broker, with each of the typed answers; and every pair of answers at least once.

    Each row gets, for the other questions, the answers that met its own least often so far. The first rows have
    one stub and all brokers, so those whose whole suites run differ in the other questions.
    """
    of_a_row = ("handler_stub", "broker")
    others = every_choice([question for question in CHOICES if question not in of_a_row])
    met: Counter[Pair] = Counter()
    found = []
    for (handlers, names), row in product(HANDLERS, every_choice(of_a_row)):
        candidates = [{"names": names, **row, **other} for other in others]
        best = min(candidates, key=lambda one: sum(met[pair] for pair in pairs(one)))
        met.update(pairs(best))
        found.append(Combination({name: best[name] for name in CHOICES}, handlers, names))
    return found


Pair = tuple[tuple[str, str], ...]


def pairs(answers: dict[str, str]) -> list[Pair]:
    return list(combinations(answers.items(), 2))


SPREAD = spread()
"""For costly tests: the tools, and the services' own tests."""


def every_combination() -> list[Combination]:
    """The full product of all choices, with the typed answers in turn: for tests that cost little more than that."""
    typed = cycle(HANDLERS)
    return [Combination(chosen, *next(typed)) for chosen in every_choice(CHOICES)]


def parse_yaml(text: str) -> Any:
    """The only document in the text; YAML 1.2, in which ``on`` is a word."""
    return deepcopy(_parsed(text))


@cache
def _parsed(text: str) -> Any:
    """Parsed once: the same manifest is in many services, and the parser is slow."""
    return YAML(typ="safe", pure=True).load(text)


Render = Callable[..., "Service"]
"""The fixtures `render` and `render_own`: they take answers, and return a service."""
Prove = Callable[[str, str], None]
"""The fixture `prove`."""


@dataclass(frozen=True)
class Service:
    """A rendered service."""

    path: Path
    package: str

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def read(self, name: str) -> str:
        return (self.path / name).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")

    @property
    def metadata(self) -> dict[str, Any]:
        return tomllib.loads(self.read("pyproject.toml"))

    @property
    def files(self) -> dict[str, bytes]:
        """Every file's content, without the files of tools."""
        return {
            file.relative_to(self.path).as_posix(): file.read_bytes()
            for file in self.path.rglob("*")
            if file.is_file() and not CACHES.intersection(file.parts)
        }

    def example(self, handler: str) -> str:
        """The example message in the handler's file."""
        text = self.read(f"src/{self.package}/handlers/{handler}.py")
        tree = ast.parse(text)
        [example] = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXAMPLE"
        ]
        assert isinstance(example, bytes)
        return example.decode()

    def demo(self) -> str:
        """The output of its demo: twenty messages, each handled at the first attempt."""
        command = ("python", "-m", self.package, "demo")
        # A handler that fails would be retried for minutes.
        ended = self.run(*command, environment=self.environment(), CONSUMER_MAX_ATTEMPTS="1")
        assert ended.returncode == 0, ended.stdout
        assert "published 20, handled 20, dead letters 0" in ended.stdout
        return ended.stdout

    def copy_to(self, folder: Path) -> "Service":
        shutil.copytree(self.path, folder / self.path.name, ignore=shutil.ignore_patterns(*CACHES))
        return Service(folder / self.path.name, self.package)

    def environment(self, python: str = sys.executable, resolution: str = "highest") -> Path:
        """A virtual environment with this service's declared dependencies, without the service and anything else.

        Services with the same dependencies share it, and it is kept for the next run.
        """
        metadata = self.metadata
        declared = [
            metadata["project"]["dependencies"],
            metadata["project"]["requires-python"],
            metadata["dependency-groups"],
            str(Path(python).resolve()),
            resolution,
        ]

        def make(environment: Path) -> None:
            scratch = environment.with_suffix(".declared")
            scratch.mkdir(exist_ok=True)
            shutil.copy(self.path / "pyproject.toml", scratch)
            sync = ["uv", "sync", "--quiet", "--no-install-project", "--group", "dev"]
            sync += ["--python", python, "--resolution", resolution]
            run(*sync, cwd=scratch, env={"UV_PROJECT_ENVIRONMENT": str(environment)})

        return environment_of(declared, make)

    def run(self, *command: str, environment: Path, **variables: str) -> "Result":
        """Run a command of the environment in the service's folder, with the service importable."""
        path = f"{environment / BIN}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "PYTHONPATH": "src", "MYPY_CACHE_DIR": mypy_cache().name, **variables}
        return run(*command, cwd=self.path, check=False, env=env)


@cache
def mypy_cache() -> "TemporaryDirectory[str]":
    """One cache for all services: mypy itself checks the differences. Each process of a test run has its own."""
    return TemporaryDirectory(prefix="mypy-")


def environment_of(declared: object, make: Callable[[Path], None]) -> Path:
    """The virtual environment of these dependencies, created if there is none, and kept for the next run."""
    environment = ENVIRONMENTS / sha256(json.dumps(declared).encode()).hexdigest()[:16]
    environment.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{environment}.lock"):
        if not (environment / ".complete").exists():
            shutil.rmtree(environment, ignore_errors=True)
            make(environment)
            (environment / ".complete").touch()
    return environment


MODULES = {"PYTHONPATH": os.pathsep.join(map(str, PYTHON_PATH))}
"""The paths of tools, runtime and harness for the commands of tasks.py."""
BIN = "Scripts" if os.name == "nt" else "bin"
Result = subprocess.CompletedProcess[str]
INHERITED = (
    *("CONSUMER_TEST_BROKER_COMMAND", "CONSUMER_TEST_BROKER_URL", "REQUIRE_BROKERS"),
    *("HOME", "LANG", "PATH", "TMPDIR"),
)
INSTALLERS = ("PIP_", "UV_", "SSL_", "HTTP", "http")


def run(
    *command: str, cwd: Path, check: bool = True, stdin: str = "", env: Mapping[str, str] = {}
) -> Result:
    """Run a command with only the required variables of this process's environment."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in INHERITED or name.startswith(INSTALLERS)
    }
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **env},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if check:
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
    return result


def run_task(task: str, *arguments: str, check: bool = True) -> Result:
    """Run ``tasks.py TASK`` with its declared dependencies, and nothing else."""
    needed = requirements(task)

    def make(environment: Path) -> None:
        run("uv", "venv", "--quiet", "--python", sys.executable, str(environment), cwd=TEMPLATE)
        install = ("uv", "pip", "install", "--quiet", "--python", str(environment / BIN / "python"))
        run(*install, *needed, cwd=TEMPLATE)

    programs = environment_of([*needed, str(Path(sys.executable).resolve())], make) / BIN
    [command] = COMMANDS[task]
    env = {**MODULES, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    return run(str(programs / "python"), *command, *arguments, cwd=TEMPLATE, check=check, env=env)


def run_tool(name: str, *arguments: object, check: bool = True, cwd: Path = TEMPLATE) -> Result:
    """Run ``python -m tools.NAME`` of the template in this folder, with the interpreter of the tests."""
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return run(*command, cwd=cwd, check=check, env=MODULES if cwd == TEMPLATE else {})


def cookiecutter(
    folder: Path,
    *arguments: str,
    template: Path = TEMPLATE,
    stdin: str = "",
    env: Mapping[str, str] = {},
) -> Result:
    """Run cookiecutter's own command line in this folder, with its own home."""
    (folder / "home").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cookiecutter", str(template), "--default-config", *arguments]
    env = {"HOME": str(folder / "home"), **env}
    return run(*command, cwd=folder, check=False, stdin=stdin, env=env)
