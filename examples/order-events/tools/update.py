# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Merges the template's changes into this project.

``python3 tools/update.py [question=answer ...]`` needs git and cookiecutter (or uv). The branch `template` holds the
unmodified render. Each update commits a new render to that branch and merges the branch, so your changes are kept and
the history shows both. An answer on the command line replaces the recorded one, for example ``broker=nats``.
``package_name=NEW`` renames the package first, in your files too.

Exit codes: 0 updated, or already up to date; 1 failed, or the merge has conflicts; 2 usage.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RECORD = PROJECT / ".template-answers.json"
BRANCH = "refs/heads/template"


def main() -> int:
    arguments = parse_arguments()
    try:
        recorded = json.loads(RECORD.read_text(encoding="utf-8"))
        answers: dict[str, str] = recorded["answers"]
        template = arguments.template or recorded["template"]
        came_from = arguments.came_from or recorded.get("commit") or f"v{recorded['version']}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return refuse(
            f".template-answers.json does not record the template and the answers: {error!r}."
        )
    changes = dict(answer.split("=", 1) for answer in arguments.answers)
    if unknown := sorted(changes.keys() - answers.keys()):
        return refuse(f"unknown question {unknown[0]!r}; choose from {', '.join(answers)}.", 2)
    if git("status", "--porcelain"):
        return refuse("commit or stash your changes first.")
    with rendered(template, arguments.checkout, {**answers, **changes}) as folder:
        if not git("for-each-ref", BRANCH):
            # The first update: the render that this project came from becomes the first commit of the branch.
            with rendered(template, came_from, answers) as past:
                shutil.copy(RECORD, past)  # identical to this one, so the merge takes the new one
                commit(past, f"Template as rendered: {came_from}")
        first = git("rev-list", "--max-parents=0", BRANCH)
        if first not in git("rev-list", "--max-parents=0", "HEAD").split():
            # The history does not contain it: the first update, or the last merge request was squashed or not merged.
            join = ["--strategy=ours", "--allow-unrelated-histories", "--message=Join the template"]
            git("merge", "--quiet", *join, first)
        new = json.loads((folder / RECORD.name).read_text(encoding="utf-8"))
        package = new["answers"]["package_name"]
        if package != answers["package_name"]:
            if exit_code := merge():  # the previous update, if it is not merged yet
                return exit_code
            rename(answers["package_name"], package)
        commit(folder, f"Template {new['version']}", files_of_yours(package))
    return merge()


def files_of_yours(package: str) -> list[str]:
    return [f"src/{package}/handlers", f"src/{package}/settings.py", "tests/handlers"]


def merge() -> int:
    result = subprocess.run(["git", "merge", "--no-edit", BRANCH], cwd=PROJECT, check=False)
    if result.returncode != 0:
        return refuse(
            "merge conflicts in the files above: resolve and commit them, or run `git merge --abort`."
        )
    return 0


def rename(old: str, new: str) -> None:
    """Rename the package here and on the branch, and join both, so that the next merge sees only the other changes."""
    message = f"Rename the package {old} to {new}"
    with renamed(BRANCH, old, new) as past:
        commit(past, message)
    with renamed("HEAD", old, new) as present, index_of(present) as index:
        parents = ("-p", "HEAD", "-p", BRANCH)
        tree = git("write-tree", environment=index)
        git("merge", "--quiet", "--ff-only", git("commit-tree", tree, *parents, "-m", message))


@contextmanager
def renamed(revision: str, old: str, new: str) -> Iterator[Path]:
    """The files of the revision with the package renamed, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="template-") as scratch:
        folder = Path(scratch, "files")
        folder.mkdir()
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        checkout = ("checkout", "--quiet", revision, "--", ".")
        git(f"--work-tree={folder}", *checkout, cwd=folder, environment=index)
        package = folder / "src" / old
        # Only where the word is the package: it may also be a variable, or a word in a sentence.
        modules = "|".join(sorted({re.escape(path.stem) for path in package.iterdir()}))
        before = r"""^ *(?:from|import) |\bsrc/|-m["', ]+|"package_name": \""""
        word = re.compile(rf"({before}){old}\b|(?<![\w./-]){old}(?=\.(?:{modules})\b)", re.M)
        package.rename(package.with_name(new))
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with suppress(UnicodeDecodeError):  # a binary file
                    text = file.read_bytes().decode()
                    file.write_bytes(word.sub(lambda found: (found[1] or "") + new, text).encode())
        yield folder


@contextmanager
def rendered(template: str, checkout: str | None, answers: dict[str, str]) -> Iterator[Path]:
    """The project as the template renders it, in a temporary folder."""
    if checkout and Path(template).is_dir():  # cookiecutter checks out only clones
        template = f"git+{Path(template).resolve().as_uri()}"
    with tempfile.TemporaryDirectory(prefix="template-") as scratch:
        command = [*cookiecutter(), template, "--no-input", "--output-dir", scratch]
        command += ["--checkout", checkout] if checkout else []
        given = [f"{question}={answer}" for question, answer in answers.items()]
        result = subprocess.run([*command, *given], stdout=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            sys.exit(
                refuse(f"cookiecutter could not render {checkout or 'the newest'} of {template}.")
            )
        [folder] = Path(scratch).iterdir()
        yield folder


def cookiecutter() -> list[str]:
    for command in (["cookiecutter"], ["uvx", "cookiecutter"]):
        if shutil.which(command[0]):
            return command
    return [sys.executable, "-m", "cookiecutter"]


def commit(folder: Path, message: str, kept: list[str] | None = None) -> None:
    """Commit the folder to the branch; files in ``kept`` stay as they are on the branch."""
    with index_of(folder) as index:
        parents = []
        if parent := git("for-each-ref", "--format=%(objectname)", BRANCH):
            parents = ["-p", parent]
            if kept:
                git("rm", "-rfq", "--cached", "--ignore-unmatch", "--", *kept, environment=index)
                entries = git("ls-tree", "-r", "-z", parent, "--", *kept)
                git("update-index", "-z", "--index-info", stdin=entries, environment=index)
        tree = git("write-tree", environment=index)
        if tree == git("for-each-ref", "--format=%(tree)", BRANCH):
            return
        git("update-ref", BRANCH, git("commit-tree", tree, *parents, "-m", message))


@contextmanager
def index_of(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a temporary git index that contains all files of the folder."""
    with tempfile.TemporaryDirectory(prefix="template-") as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        work_tree = f"--work-tree={folder}"
        git(work_tree, "add", "--all", "--force", ".", cwd=folder, environment=index)
        yield index


def git(
    *arguments: str, cwd: Path = PROJECT, stdin: str = "", environment: Mapping[str, str] = {}
) -> str:
    directory = [f"--git-dir={git_directory()}"] if cwd != PROJECT else []
    result: Any = subprocess.run(
        ["git", *directory, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        input=stdin,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if result.returncode != 0:
        sys.exit(refuse(f"git {arguments[0]} failed; see the message above."))
    return str(result.stdout).strip("\n")


def git_directory() -> str:
    return git("rev-parse", "--absolute-git-dir")


def refuse(sentence: str, exit_code: int = 1) -> int:
    print(f"update.py: {sentence}", file=sys.stderr)
    return exit_code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="update.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("answers", nargs="*", metavar="question=answer", help="an answer to change")
    parser.add_argument("--checkout", help="tag or commit of the template (default: the newest)")
    parser.add_argument("--template", help="URL or path of the template, if it has moved")
    parser.add_argument(
        "--came-from", help="tag or commit that this project was rendered from, if not recorded"
    )
    arguments = parser.parse_args()
    if wrong := [answer for answer in arguments.answers if "=" not in answer]:
        parser.error(f"{wrong[0]!r} must have the form question=answer")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
