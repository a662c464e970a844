# cookiecutter-consumer {{ cookiecutter._template_version }} | vendored, identical in every service: do not edit it here.
"""Merges the template's changes into this project.

``python3 tools/update.py [question=answer ...]`` needs git and cookiecutter (or uv). It renders the recorded version of
the template and the wanted one, and applies the difference to the current branch as `git cherry-pick` does: your changes
are kept, and no other branch is read or written. An answer on the command line replaces the recorded one, for example
``broker=nats``. ``package_name=NEW`` renames the package first, in your files too.

Exit codes: 0 updated, or already up to date; 1 failed without a change, or the merge has conflicts; 2 usage.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PROJECT = Path(__file__).resolve().parents[1]
RECORD = ".template-answers.json"
BUSY = "MERGE_HEAD CHERRY_PICK_HEAD REVERT_HEAD BISECT_LOG sequencer rebase-merge rebase-apply"


def main() -> None:
    arguments = parse_arguments()
    try:
        recorded = json.loads(PROJECT.joinpath(RECORD).read_text(encoding="utf-8"))
        answers: dict[str, str] = recorded["answers"]
        place = (arguments.template or recorded["template"], recorded.get("directory", ""))
        came_from = arguments.came_from or recorded.get("commit") or f"v{recorded['version']}"
        texts = map(str.isprintable, (*place, came_from, *answers.values()))
        if not all(texts) or not all(re.fullmatch(r"[a-z]\w*", question) for question in answers):
            raise ValueError("a text of several lines, or the name of no question")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        refuse(f"{RECORD} does not record the template and the answers: {error!r}.")
    changes = dict(answer.split("=", 1) for answer in arguments.answers)
    for question in changes:
        if question not in answers:
            refuse(f"unknown question {question!r}; choose from {', '.join(answers)}.", 2)
        if question in ("handlers", "handler_stub"):
            refuse(f"{question} is not for updates: `new-handler` adds a handler.", 2)
    with tempfile.TemporaryDirectory(prefix="template-") as tempfile.tempdir:
        prefix = prefix_of_clean_project()
        past = rendered(place, came_from, answers)
        present = rendered(place, arguments.checkout, {**answers, **changes})
        new = json.loads(present.joinpath(RECORD).read_text(encoding="utf-8"))
        head, base = git("rev-parse", "HEAD^{tree}"), tree_of(past)
        ours, package = head, new["answers"]["package_name"]
        if package != answers["package_name"]:
            names = (answers["package_name"], package)
            ours = placed(renamed(git("rev-parse", f"HEAD:{prefix}"), *names), head, prefix)
            base = renamed(base, *names)
        # Both sides of the difference have what is the team's as the team has it.
        yours = [f"src/{package}/handlers", f"src/{package}/settings.py", "tests/handlers"]
        base = placed(base, ours, prefix, *yours, RECORD)
        theirs = placed(tree_of(present), ours, prefix, *yours)
        changed = dict(files(theirs).items() - files(base).items())
        added = (changed.keys() | files(ours).keys()) - files(head).keys()
        for one in git("ls-files", "--others", "--full-name", "-z").split("\0"):
            if one and any(inside(one, path) or inside(path, one.rstrip("/")) for path in added):
                refuse(f"{one} is in the way, and git does not track it: move or commit it.")
        if base == theirs and ours == head:
            print("Already up to date.")
        else:
            apply(f"Template {new['version']}", base, theirs, "" if ours == head else ours)


def prefix_of_clean_project() -> str:
    """The project's folder in its repository; exits if the repository is in no state to be updated."""
    if not shutil.which("git"):
        refuse("git is not installed.")
    asked = git("rev-parse", "--absolute-git-dir", "--is-inside-work-tree", "--show-prefix")
    directory, in_work_tree, prefix = f"{asked}\n".split("\n")[:3]
    if in_work_tree != "true" or not git("ls-files", "--", RECORD):
        refuse("commit this project to a git repository first.")
    if going_on := [name for name in BUSY.split() if Path(directory, name).exists()]:
        refuse(f"finish or abort first what git has in progress ({going_on[0]}).")
    if not Path(directory, "HEAD").read_text(encoding="utf-8").startswith("ref: "):
        refuse("HEAD is detached: switch to a branch first.")
    if git("status", "--porcelain", "--untracked-files=no"):
        refuse("commit or stash your changes first.")
    return prefix


def apply(message: str, base: str, theirs: str, renamed_tree: str) -> None:
    """Commit the difference of the two trees to the current branch; after a rename, as a second commit."""
    before = git("rev-parse", "HEAD")
    parent = git("commit-tree", base, "-m", "The template's files as they were rendered")
    if renamed_tree:
        rename = git("commit-tree", renamed_tree, "-p", before, "-m", "Rename the package")
        git("reset", "--keep", rename)
    # Git would move the team's files into a folder that the template has renamed.
    pick = ["git", "-c", "merge.directoryRenames=false", "cherry-pick", "--keep-redundant-commits"]
    pick.append(git("commit-tree", theirs, "-p", parent, "-m", message))
    if subprocess.run(pick, cwd=PROJECT, check=False).returncode != 0:
        if git("ls-files", "--unmerged", "--", ":/"):
            refuse("conflicts in the files above: resolve them, or run `git cherry-pick --abort`.")
        run(["git", "cherry-pick", "--abort"], PROJECT)  # refused by git or by a hook
        git("reset", "--keep", before)
        refuse("git did not commit the update, see above; nothing is changed.")


def placed(tree: str, head: str, prefix: str, *yours: str) -> str:
    """The tree ``head`` with this one in the place of the project's, except for ``yours``."""

    def replaced(path: str) -> bool:
        kept = any(inside(path, f"{prefix}{one}") for one in yours)
        return path.startswith(prefix) and not kept

    both = {path: blob for path, blob in files(head).items() if not replaced(path)}
    new = {f"{prefix}{name}": blob for name, blob in files(tree).items()}
    both |= {path: blob for path, blob in new.items() if replaced(path)}
    env, entries = index(), "".join(f"{blob}\t{path}\0" for path, blob in both.items())
    git("update-index", "-z", "--index-info", stdin=entries, env=env)
    return git("write-tree", env=env)


def inside(path: str, folder: str) -> bool:
    """Also true of the path itself."""
    return f"{path}/".startswith(f"{folder}/")


def files(tree: str) -> dict[str, str]:
    """Mode and blob of each file, by its path."""
    entries = git("ls-tree", "-r", "-z", "--full-tree", tree).split("\0")[:-1]
    return {path: blob for blob, _, path in (entry.partition("\t") for entry in entries)}


def tree_of(folder: Path) -> str:
    env = index()
    git(f"--work-tree={folder}", "add", "--all", "--force", ".", cwd=folder, env=env)
    return git("write-tree", env=env)


def renamed(tree: str, old: str, new: str) -> str:
    """The tree with the package renamed, in its files too."""
    folder = Path(tempfile.mkdtemp())
    git(f"--work-tree={folder}", "checkout", "-q", tree, "--", ".", cwd=folder, env=index())
    package = folder / "src" / old
    submodules = [path for path, blob in files(tree).items() if blob.startswith("160000")]
    if submodules or not package.is_dir() or package.with_name(new).exists():
        refuse(f"no rename: there is a submodule, or src/{new}, or src/{old} does not exist.")
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
    return tree_of(folder)


def rendered(place: tuple[str, str], checkout: str, answers: Mapping[str, str]) -> Path:
    """The project as the template renders it, in a temporary folder."""
    template, directory = place
    if Path(template).is_dir():  # cookiecutter checks out only clones
        template = f"git+{Path(template).resolve().as_uri()}"
    scratch, config = tempfile.mkdtemp(), Path(tempfile.mkdtemp(), "config.yaml")
    # Its clones go there: in its usual folder it would delete another one of the same name.
    own = dict.fromkeys(["cookiecutters_dir", "replay_dir"], str(config.parent))
    config.write_text(json.dumps(own), encoding="utf-8")
    commands = [["cookiecutter"], ["uvx", "cookiecutter"], [sys.executable, "-m", "cookiecutter"]]
    command = next(one for one in commands if shutil.which(one[0]))
    command += ["--no-input", f"--output-dir={scratch}", f"--checkout={checkout}"]
    command += [f"--config-file={config}"]
    command += [f"--directory={directory}", "--", template]
    result = run([*command, *(f"{question}={answer}" for question, answer in answers.items())])
    what = f"cookiecutter could not render {checkout} of {template}"
    if result.returncode != 0:
        refuse(f"{what}: {reason_in(result.stdout + result.stderr)}")
    [folder] = Path(scratch).iterdir()
    if json.loads((folder / RECORD).read_text(encoding="utf-8")).get("commit") == "":
        refuse(f"{what}: it is not a git repository; name one with --template.")
    return folder


def index() -> dict[str, str]:
    """The environment of an empty git index."""
    return {"GIT_INDEX_FILE": str(Path(tempfile.mkdtemp(), "index"))}


def git(*words: str, cwd: Path = PROJECT, stdin: str = "", env: Mapping[str, str] = {}) -> str:
    directory = [f"--git-dir={git('rev-parse', '--absolute-git-dir')}"] if cwd != PROJECT else []
    result = run(["git", *directory, *words], cwd, stdin, env)
    if result.returncode != 0:
        refuse(f"git {' '.join(words[:2])} failed: {reason_in(result.stderr)}")
    return str(result.stdout).strip("\n")


def run(command: list[str], cwd: Any = None, stdin: str = "", env: Mapping[str, str] = {}) -> Any:
    text: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # paths may be any bytes
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, **text)


def reason_in(output: str) -> str:
    """The line that says what went wrong: git's, else the last one."""
    lines = output.strip().splitlines() or ["no reason was given"]
    return next((line for line in lines if line.startswith("fatal: ")), lines[-1])


def refuse(sentence: str, exit_code: int = 1) -> NoReturn:
    print(f"update.py: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="update.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("answers", nargs="*", metavar="question=answer", help="an answer to change")
    parser.add_argument("--checkout", default="HEAD", help="tag or commit (default: the newest)")
    parser.add_argument("--template", help="URL or path of the template, if it has moved")
    parser.add_argument("--came-from", help="tag or commit of the last render, if not recorded")
    arguments = parser.parse_args()
    if wrong := [answer for answer in arguments.answers if "=" not in answer]:
        parser.error(f"{wrong[0]!r} must have the form question=answer")
    return arguments


if __name__ == "__main__":
    main()
