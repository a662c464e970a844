"""Builds the documentation site into .cache/site; a broken link or anchor is an error. ``python3 tasks.py docs``

It runs in its own folder: Zensical keeps its cache in ``.cache``, where the tests keep their environments, and deletes
all of that for a clean build.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import ROOT

SITE = ROOT / ".cache/site"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="site-") as scratch:
        shutil.copytree(ROOT / "docs", Path(scratch, "docs"))
        shutil.copy(ROOT / "zensical.toml", scratch)
        build = [sys.executable, "-m", "zensical", "build", "--strict"]
        result = subprocess.run(build, cwd=scratch, check=False)
        if result.returncode == 0:
            shutil.rmtree(SITE, ignore_errors=True)
            shutil.copytree(Path(scratch, "site"), SITE)
            print(f"{SITE.relative_to(ROOT).as_posix()}/index.html")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
