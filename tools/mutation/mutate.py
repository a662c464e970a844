"""Mutation testing: ``python3 tasks.py mutate [MODULE[.FUNCTION]...] [--repository FOLDER] [--workers N]``.

mutmut makes one small change at a time to a copy of the runtime, and each time the tests of the module must fail. A
mutant that no test detects survives: it is printed, and is an error unless survivors.toml lists it with a reason. A
mutant that exceeds the time limit counts as killed.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tools import PACKAGE, ROOT, TREE
from tools.scaffold import user_environment

ACCEPTED = Path(__file__).with_name("survivors.toml")
TESTS = {
    "cancellation": "test_cancellation test_cancellation_properties test_signals",
    "consumer": "test_consumer test_ordering test_bad_input",
    "sqlite": "test_sqlite test_contract test_every_source",
}
"""The tests that must detect the mutants of a module."""
MARKS = {"consumer": "not very_slow"}
"""The slow tests of the other modules are too slow to run once for each mutant."""
FOLDERS = {"sqlite": "brokers/"}
CACHES = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", ".venv", "mutants")

COPIED = (
    (PACKAGE / "runtime", "src/runtime"),
    (TREE / "tests/runtime", "tests/runtime"),
    (ROOT / "tests/runtime", "tests/runtime"),
)
"""Folders of the repository, and their places in a project for mutmut."""

PYTEST_SETTINGS = """
[tool.pytest.ini_options]
pythonpath = ["src", "tests/runtime"]
asyncio_mode = "auto"
asyncio_default_fixture_loop_scope = "function"
filterwarnings = ["error"]
markers = ["slow", "very_slow"]
"""
MUTMUT_SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = ["{path}"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "--timeout", "15", "-m", "{marks}"]
pytest_add_cli_args_test_selection = {tests}
timeout_multiplier = 3.0
timeout_constant = 4.0
track_dependencies = false
use_git_change_detection = false
"""
NOTICED = {"killed", "timeout", "check was interrupted by user"}
"""The last outcome: the mutant did not catch the SIGINT of a test, and that ended pytest."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="tasks.py mutate", description=__doc__)
    parser.add_argument("what", nargs="*", default=list(TESTS), metavar="MODULE[.FUNCTION]")
    parser.add_argument(
        "--repository",
        type=Path,
        default=ROOT,
        help="the repository with the runtime and its tests",
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".cache/mutation", help="the working folder"
    )
    parser.add_argument("--workers", type=int, default=2, help="concurrent mutants")
    arguments = parser.parse_args()
    if unknown := {what.partition(".")[0] for what in arguments.what} - TESTS.keys():
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}; {', '.join(TESTS)}")
    reasons = tomllib.loads(ACCEPTED.read_text("utf-8"))["accepted"]
    accepted = {mutant for group in reasons for mutant in group["mutants"]}
    unexpected = 0
    for what in arguments.what:
        module, _, function = what.partition(".")
        began_at = time.monotonic()
        folder = arguments.folder / what
        copy_project(arguments.repository, folder)
        count, survivors = mutate(folder, module, function, arguments.workers)
        new = [survivor for survivor in survivors if survivor not in accepted]
        print("\n".join(new))
        print(
            f"{what}: {count} mutants in {time.monotonic() - began_at:.0f} seconds;"
            f" {len(survivors) - len(new)} survive for a reason, {len(new)} for none",
            flush=True,
        )
        unexpected += len(new)
        if not function:
            stale = {one for one in accepted if one.startswith(f"{module}: ")} - {*survivors}
            print("\n".join(f"no longer survives: {one}" for one in sorted(stale)))
    return 1 if unexpected else 0


def copy_project(repository: Path, folder: Path) -> None:
    """The runtime and its tests, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for source, copy in COPIED:
        present = repository / source.relative_to(ROOT)
        shutil.copytree(present, folder / copy, ignore=CACHES, dirs_exist_ok=True)
    # With it pytest would import the tests as the package `runtime`.
    (folder / "tests/runtime/__init__.py").unlink(missing_ok=True)


def mutate(folder: Path, module: str, function: str, workers: int) -> tuple[int, list[str]]:
    """The number of mutants, and those that no test detected. Changes the folder."""
    path = f"src/runtime/{FOLDERS.get(module, '')}{module}.py"
    source = folder / path
    source.write_text(undecorated(source.read_text("utf-8")), "utf-8")
    settings = MUTMUT_SETTINGS.format(
        path=path,
        tests=[f"tests/runtime/{name}.py" for name in TESTS[module].split()],
        marks=MARKS.get(module, "not slow"),
    )
    (folder / "pyproject.toml").write_text(PYTEST_SETTINGS + settings, "utf-8")
    only = [f"*.{module}.*{function}__mutmut_*"] if function else []
    mutmut(folder, "run", "--max-children", str(workers), *only)
    results = re.findall(r"^ +(\S+): (.+)$", mutmut(folder, "results", "--all", "true"), re.M)
    if only:
        results = [(name, result) for name, result in results if f"{function}__mutmut_" in name]
    assert results, "there is no such function, or no mutant of it"
    unnoticed = [name for name, result in results if result not in NOTICED]
    survivors = sorted(
        {described(module, name, mutmut(folder, "show", name)) for name in unnoticed}
    )
    return len(results), survivors


def mutmut(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", *arguments],
        cwd=folder,
        env=user_environment(),  # the runtime is the copy
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout[-4000:])
    return done.stdout


def described(module: str, name: str, difference: str) -> str:
    """A mutant by its change and not by its place: ``module: function: before -> after``."""
    function = re.sub(r".*\.(?:x_|xǁ)(.+)__mutmut_\d+", r"\1", name).replace("ǁ", ".")
    before, after = (
        " ".join(
            " ".join(re.findall(rf"^[{sign}](?![{sign}]{{2}})(.*)$", difference, re.M)).split()
        )
        for sign in "-+"
    )
    return f"{module}: {function}: {before} -> {after}"


def undecorated(source: str) -> str:
    """The same source with each decorator applied after the function, since mutmut mutates no decorated function."""
    lines = source.splitlines(keepends=True)
    for node in sorted(functions(ast.parse(source)), key=lambda node: node.lineno, reverse=True):
        assert node.end_lineno is not None
        indent = " " * node.col_offset
        names = [ast.unparse(decorator) for decorator in node.decorator_list]
        # The runtime inspects the frames of generator-based coroutines, and mutmut would add a frame.
        if names and "types.coroutine" not in names:
            applied = f"{''.join(f'{name}(' for name in names)}{node.name}{')' * len(names)}"
            lines.insert(node.end_lineno, f"{indent}{node.name} = {applied}\n")
            del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "".join(lines)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in [
        *tree.body,
        *(inner for one in tree.body if isinstance(one, ast.ClassDef) for inner in one.body),
    ]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


if __name__ == "__main__":
    sys.exit(main())
