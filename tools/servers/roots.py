"""Newer programs than the machine's: the /usr of another Debian release, for single programs of this machine.

``made`` unpacks packages of a release into .cache/roots, with mmdebstrap, from the mirror that the machine's own apt
uses. ``beside`` gives the words before a command in whose PATH these programs come first: each of them sees the
machine's files, processes and network, but the other /usr. The mounts are in a namespace of the command, which ends with
all of its processes when the command ends. For newer packages of a release that moves: ``rm -r .cache/roots``.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from tools import ROOT

ROOTS = ROOT / ".cache/roots"
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
OPTIONS = (
    'Acquire::Check-Valid-Until "false"',  # for the releases that move; the signatures are checked
    'APT::Install-Recommends "false"',
)

# Process 1 of the namespace must be a shell that waits: it reaps what the servers leave.
BESIDE = """
root=$1 work=$2; shift 2
mount -t tmpfs -o mode=755 root "$work/root"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$work/root/"
    elif [ -d "$entry" ]; then mkdir "$work/root$entry"; mount --rbind "$entry" "$work/root$entry"
    fi
done
mount --rbind "$root/usr" "$work/root/usr"
mount --rbind "$root/etc/alternatives" "$work/root/etc/alternatives"
scripts=/usr/lib/rabbitmq/bin  # which the harness of the tests prefers to the PATH
if [ -e "$work/bin/rabbitmq-server" ] && [ -d $scripts ]; then mount --bind "$work/bin" $scripts; fi
PATH="$work/bin:$PATH"
code=0; "$@" || code=$?
exit $code
"""

# PostgreSQL is started as a user who may not chroot, except in a user namespace of its own.
WRAPPER = """\
#!/bin/sh
[ "$(id -u)" = 0 ] || own="--user --map-current-user"
PATH={path} exec unshare $own --root={root} --wd="$(pwd)" {program} "$@"
"""


class RootMissing(Exception):
    """There is no such root here; the text says why."""


def why_not() -> str:
    """Why this machine can make no roots; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can mount the /usr of another Debian release"
    for program in ("mmdebstrap", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not Path("/bin").is_symlink():
        return "this machine has programs outside of /usr"
    done = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"there are no namespaces here: {done.stderr.strip()}"


def made(suite: str, packages: Collection[str]) -> Path:
    """A root of this Debian release with at least these packages. Raises RootMissing."""
    if reason := why_not():
        raise RootMissing(reason)
    ROOTS.mkdir(parents=True, exist_ok=True)
    with FileLock(ROOTS / f"{suite}.lock"):
        if (found := there(suite, packages)) is not None:
            return found
        text = " ".join(sorted(packages))
        root = ROOTS / f"{suite}-{sha256(text.encode()).hexdigest()[:8]}"
        unfinished = root.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"Getting {text} of Debian {suite} ...", file=sys.stderr, flush=True)
        command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt"]
        command += [f"--aptopt={option}" for option in OPTIONS]
        command += [f"--include={','.join(packages)}", suite, str(unfinished), *mirror()]
        done = subprocess.run([*NAMESPACES, *command], capture_output=True, text=True)
        if done.returncode != 0:
            msg = f"mmdebstrap got no {text} of Debian {suite}: {done.stderr.strip()[-500:]}"
            raise RootMissing(msg)
        (unfinished / "packages").write_text(text, encoding="utf-8")
        return unfinished.rename(root)


def there(suite: str, packages: Collection[str]) -> Path | None:
    """Such a root, if one was made earlier."""
    for file in sorted(ROOTS.glob(f"{suite}-????????/packages")):
        if set(file.read_text(encoding="utf-8").split()) >= {*packages}:
            return file.parent
    return None


def mirror() -> list[str]:
    """The mirror of Debian that the machine's apt uses; if none, mmdebstrap has a default."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    uris = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [uri for uri in uris if re.search(r"/debian/?$", uri)][:1]


@contextmanager
def beside(root: Path, programs: Mapping[str, str]) -> Iterator[list[str]]:
    """The words before a command in whose PATH each of these names is that program of the root.

    The name ``inside`` is a command, too: the command after it runs with the root's /usr itself.
    """
    work = Path(tempfile.mkdtemp(prefix="root-"))
    try:
        work.chmod(0o755)
        for name in ("bin", "root"):
            (work / name).mkdir()
        for name, program in {**programs, "inside": ""}.items():
            wrapper = work / "bin" / name
            path = (
                "/usr/sbin:/usr/bin:/sbin:/bin" if program else '"${PATH#*:}"'
            )  # without work/bin
            text = WRAPPER.format(path=path, root=work / "root", program=program)
            wrapper.write_text(text, encoding="utf-8")
            wrapper.chmod(0o755)
        yield [*NAMESPACES, "sh", "-ec", BESIDE, "sh", str(root), str(work)]
    finally:
        shutil.rmtree(work)


def version_of(package: str, root: Path = Path("/")) -> str:
    """The upstream version, such as 4.0.5 for 4.0.5-6+deb13u2; empty if the package is not installed there."""
    query = [
        "dpkg-query",
        f"--admindir={root / 'var/lib/dpkg'}",
        "--show",
        "--showformat=${Version}",
    ]
    done = subprocess.run([*query, package], capture_output=True, text=True)
    found = re.match(r"(?:\d+:)?(\d+(\.\d+)+)", done.stdout)
    return found[1] if found else ""
