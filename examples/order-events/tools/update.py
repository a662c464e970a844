# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""python3 tools/update.py [question=answer ...]: merges the template's changes into this project.

It needs git and cookiecutter (or uv), and runs the program of the template's newest release: the difference between the
recorded version and that release is applied to the current branch as `git cherry-pick` does, and your changes are kept.
An answer replaces the recorded one, for example broker=nats; package_name=NEW renames the package, in your files too.
--checkout VERSION    another tag, branch or commit of the template
--template PLACE      the template's URL or path, if it has moved
--came-from VERSION   that of the last render, if none is recorded
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
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
RECORD = ".template-answers.json"
HOSTS = {"gh": "github.com", "gl": "gitlab.com", "bb": "bitbucket.org"}
ENV = {**os.environ, "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh"}  # `ext` runs a command
RELEASE = r"refs/tags/v[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}"


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--template", help=argparse.SUPPRESS)
    known, _ = parser.parse_known_args()  # the rest is for the template's program
    try:
        recorded = json.loads(PROJECT.joinpath(RECORD).read_text(encoding="utf-8"))
        place, folder = known.template or recorded["template"], recorded.get("directory", "")
        for text in (place, folder, recorded.get("commit", "")):
            if text.startswith("-") or not text.isprintable():
                raise ValueError(text)
        url = Path(place).resolve().as_uri() if Path(place).is_dir() else place
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        sys.exit(f"update.py: {RECORD} does not record the template and the answers: {error!r}.")
    host, _, name = url.partition(":")
    url = f"https://{HOSTS[host]}/{name}.git" if host in HOSTS else url.removeprefix("git+")
    if not shutil.which("git"):
        sys.exit("update.py: git is not installed.")
    with tempfile.TemporaryDirectory(prefix="template-") as scratch:
        clone, program = f"{scratch}/template.git", f"{scratch}/updating.py"

        def git(*words: str) -> bytes:
            result = subprocess.run(["git", *words], env=ENV, capture_output=True)
            if result.returncode != 0:
                lines = "; ".join(re.findall("fatal: .*", result.stderr.decode(errors="replace")))
                sys.exit(f"update.py: no update from {url} (--template names another): {lines}")
            return result.stdout

        git("clone", "--quiet", "--bare", "--", url, clone)
        tags = git(f"--git-dir={clone}", "for-each-ref", "--format=%(refname)", "refs/tags")
        releases = [tag for tag in tags.decode().split() if re.fullmatch(RELEASE, tag)]
        newest = max(releases, key=lambda tag: [*map(int, tag[11:].split("."))], default="HEAD")
        if newest == "HEAD":
            print("update.py: the template has no release yet: taking its HEAD.", file=sys.stderr)
        path = f"{newest}:{folder}/tools/updating.py".replace(":/", ":")
        Path(program).write_bytes(git(f"--git-dir={clone}", "cat-file", "blob", path))
        options = [f"--project={PROJECT}", f"--clone={clone}", f"--checkout={newest}"]
        return subprocess.run([sys.executable, program, *options, *sys.argv[1:]]).returncode


if __name__ == "__main__":
    sys.exit(main())
