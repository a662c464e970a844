"""The program behind a service's ``tools/update.py``: merges the template's changes into the service.

The service's own update.py only fetches the template, and runs this file of its newest release, alone, as

    python updating.py --project=FOLDER --clone=BARE_REPOSITORY --checkout=REVISION [what the user typed]

with any Python since 3.11, and nothing installed but git and cookiecutter or uv. Services of every older version call
it so: the three options stay, a later --checkout overrides the first, and this stays one file without our own imports.

It renders the recorded version of the template and the wanted one, and applies the difference to the current branch as
`git cherry-pick` does; no other branch is read or written.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

RECORD = ".template-answers.json"
BUSY = "MERGE_HEAD CHERRY_PICK_HEAD REVERT_HEAD BISECT_LOG sequencer rebase-merge rebase-apply"
COOKIECUTTER = "2.7.1"
COOKIECUTTER_UNTIL = "2026-11-29"
"""The packages for uvx: this version, with dependencies from before this day. `tasks.py release` changes both."""
SECTION = re.compile(r"^## ([0-9]+\.[0-9]+\.[0-9]+)(.*)\n((?:(?!## ).*\n?)*)", re.M)
"""A section of CHANGELOG.md: version, mark and text."""
UNRELEASED = " (not released)"


def main() -> None:
    arguments = parse_arguments()
    moved = arguments.template
    if moved and Path(moved).is_dir():
        moved = str(Path(moved).resolve())  # a relative path would mean another folder elsewhere
    os.chdir(arguments.project)
    try:
        recorded = json.loads(Path(RECORD).read_text(encoding="utf-8"))
        answers: dict[str, str] = recorded["answers"]
        directory = recorded.get("directory", "")
        version = recorded["version"]
        came_from = arguments.came_from or recorded.get("commit") or f"v{version}"
        texts = (recorded["template"], directory, came_from, version, *answers.values())
        if not all(text.isprintable() for text in texts) or came_from.startswith("-"):
            raise ValueError("a text of several lines, or an option")
        if not all(re.fullmatch(r"[a-z]\w*", question) for question in answers):
            raise ValueError("the name of no question")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        refuse(f"{RECORD} does not record the template and the answers: {error!r}.")
    changes = dict(answer.split("=", 1) for answer in arguments.answers)
    for question in changes:
        if question not in answers:
            refuse(f"unknown question {question!r}; choose from {', '.join(answers)}.", 2)
        if question in ("handlers", "handler_stub"):
            refuse(f"{question} is not for updates: `new-handler` adds a handler.", 2)
    with tempfile.TemporaryDirectory(prefix="template-") as tempfile.tempdir:
        prefix = prefix_of_clean_project()
        template = Template(Path(arguments.clone), directory)
        past = template.rendered(came_from, answers, recorded["template"])
        wanted, checkout = {**answers, **changes}, arguments.checkout
        if template.is_in(checkout, came_from):  # the service is newer than the newest release
            checkout = came_from
        present = template.rendered(checkout, wanted, moved or recorded["template"])
        new = json.loads((present / RECORD).read_text(encoding="utf-8"))
        head, base = git("rev-parse", "HEAD^{tree}"), tree_of(past)
        ours, package = head, new["answers"]["package_name"]
        if package != answers["package_name"]:
            names = (answers["package_name"], package)
            ours = placed(renamed(git("rev-parse", f"HEAD:{prefix}"), *names), head, prefix)
            base = renamed(base, *names)
        # Both sides of the difference get the team's files from the team.
        yours = [f"src/{package}/handlers", f"src/{package}/settings.py", "tests/handlers"]
        yours += git("ls-files", "--", "tests/test_rehearsal.py").split()
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
            message = message_of(new["version"], template.security(version, new))
            apply(message, base, theirs, "" if ours == head else ours)


def prefix_of_clean_project() -> str:
    """The project's folder in its repository; exits if the repository cannot be updated in its present state."""
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
    if subprocess.run(pick, check=False).returncode != 0:
        if git("ls-files", "--unmerged", "--", ":/"):
            refuse("conflicts in the files above: resolve them, or run `git cherry-pick --abort`.")
        run(["git", "cherry-pick", "--abort"])  # git or a hook refused it
        git("reset", "--keep", before)
        refuse("git did not commit the update, see above; nothing is changed.")


def placed(tree: str, head: str, prefix: str, *yours: str) -> str:
    """The tree ``head`` with this tree in the place of the project's, except for ``yours``."""

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
    """Whether the path is in the folder; also true of the folder itself."""
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
    # Only where the word is the package: it may also be a variable, or a word of a sentence.
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


@dataclass(frozen=True)
class Template:
    """The template, in a bare clone."""

    clone: Path
    directory: str
    """The template's folder in its repository; empty for the root."""

    def rendered(self, revision: str, answers: Mapping[str, str], place: str) -> Path:
        """The project as this revision renders it, in a temporary folder; it records this place as its origin."""
        scratch, config = tempfile.mkdtemp(), Path(tempfile.mkdtemp(), "config.yaml")
        # Its clones go there: in its usual folder it would delete another clone of the same name.
        own = dict.fromkeys(["cookiecutters_dir", "replay_dir"], str(config.parent))
        config.write_text(json.dumps(own), encoding="utf-8")
        pinned = ["uvx", f"--python={sys.executable}", f"--exclude-newer={COOKIECUTTER_UNTIL}"]
        pinned += [f"cookiecutter@{COOKIECUTTER}"]
        commands = [["cookiecutter"], pinned, [sys.executable, "-m", "cookiecutter"]]
        command = next(one for one in commands if shutil.which(one[0]))
        command += ["--no-input", f"--output-dir={scratch}", f"--checkout={revision}"]
        command += [f"--config-file={config}", f"--directory={self.directory}"]
        command += ["--", f"git+{self.clone.as_uri()}"]
        result = run([*command, *(f"{question}={answer}" for question, answer in answers.items())])
        if result.returncode != 0:
            reason = reason_in(result.stdout + result.stderr)
            refuse(f"cookiecutter could not render {revision} of the template: {reason}")
        [folder] = Path(scratch).iterdir()
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        text = json.dumps({**record, "template": place}, indent=2)
        (folder / RECORD).write_text(f"{text}\n", encoding="utf-8", newline="\n")
        return folder

    def is_in(self, release: str, revision: str) -> bool:
        """Whether the revision has this release in its history; a revision that the user typed is no release."""
        command = ["git", f"--git-dir={self.clone}", "merge-base", "--is-ancestor"]
        typed = not release.startswith("refs/tags/")
        return not typed and run([*command, release, revision]).returncode == 0

    def security(self, old: str, new: Mapping[str, Any]) -> list[str]:
        """The security releases after this version, until the record's version."""
        path = f"{new.get('commit')}:{self.directory}/CHANGELOG.md".replace(":/", ":")
        shown = run(["git", f"--git-dir={self.clone}", "cat-file", "blob", path])
        return security_releases(shown.stdout, after=old, until=new["version"])


def security_releases(changes: str, after: str, until: str = "999999999") -> list[str]:
    """The released versions in this text of CHANGELOG.md that have a heading ``### Security``, newest first."""
    return [
        version
        for version, mark, text in SECTION.findall(changes)
        if mark != UNRELEASED and re.search("^### Security$", text, re.M)
        if numbers(after) < numbers(version) <= numbers(until)
    ]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]{1,9}", version)))


def message_of(version: str, security: list[str]) -> str:
    """The message of the commit: its first line is the title of the weekly proposal, and the rest its text."""
    if not security:
        return f"Template {version}"
    text = f"Vulnerabilities were mended in {', '.join(security)}: see the template's CHANGELOG.md."
    return f"Template {version}, a security update\n\n{text}"


def index() -> dict[str, str]:
    """The environment of an empty git index."""
    return {"GIT_INDEX_FILE": str(Path(tempfile.mkdtemp(), "index"))}


def git(*words: str, cwd: Path | None = None, stdin: str = "", env: Mapping[str, str] = {}) -> str:
    """Run git in the project, or on its repository in the folder ``cwd``; its output."""
    directory = [f"--git-dir={git('rev-parse', '--absolute-git-dir')}"] if cwd else []
    result = run(["git", *directory, *words], cwd, stdin, env)
    if result.returncode != 0:
        refuse(f"git {' '.join(words[:2])} failed: {reason_in(result.stderr)}")
    return str(result.stdout).strip("\n")


def run(command: list[str], cwd: Any = None, stdin: str = "", env: Mapping[str, str] = {}) -> Any:
    text: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # paths may be any bytes
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, **text)


def reason_in(output: str) -> str:
    """The line with the reason: git's, or the last line."""
    lines = output.strip().splitlines() or ["no reason was given"]
    return next((line for line in lines if line.startswith("fatal: ")), lines[-1])


def refuse(sentence: str, exit_code: int = 1) -> NoReturn:
    print(f"update.py: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="update.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument("answers", nargs="*", metavar="question=answer", help="an answer to change")
    parser.add_argument("--checkout", help="tag, branch or commit (default: the newest release)")
    parser.add_argument("--template", help="URL or path of the template, if it has moved")
    parser.add_argument("--came-from", help="tag or commit of the last render, if not recorded")
    parser.add_argument("--project", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--clone", required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if wrong := [answer for answer in arguments.answers if "=" not in answer]:
        parser.error(f"{wrong[0]!r} must have the form question=answer")
    return arguments


if __name__ == "__main__":
    main()
