"""A machine in its own namespaces, over an unchanged root of another Debian release: with a real systemd, or none."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("python-is-python3", "python3-pip", "python3-venv", "systemd")
"""The packages of a root that boots, and that is also the base of an image."""
TARGET = """\
[Unit]
Description=What process 1 starts: nothing
DefaultDependencies=no
AllowIsolate=yes
"""
CGROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
START_SECONDS = 30

# The devices and file systems that systemd requires of a container manager; see systemd.io/CONTAINER_INTERFACE.
# Mounts are shared, so that a credential that systemd mounts reaches the namespace of its service.
BOOT = """
root=$1 work=$2; shift 2
mount -t overlay -o "lowerdir=$root,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
cd "$work/root"
while [ $# -gt 0 ]; do mkdir -p ".$2"; mount --rbind "$1" ".$2"; shift 2; done
mount -t proc proc proc
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs dev/shm
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
pivot_root . mnt
cd /
umount -l /mnt
mount --make-rshared /
touch /run/mounted
exec env -i container=other PATH=/usr/sbin:/usr/bin \
"""
SYSTEMD = (
    "/usr/lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no"
)
REAPER = "sh -c 'while sleep 1000; do :; done'"
"""Process 1 if systemd is not needed."""
NAMESPACES = ("--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "--kill-child")


@dataclass
class Machine:
    """A machine that runs until the block of `booted` ends."""

    pid: int
    """The id of its process 1 on this machine."""

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a command in the machine."""
        enter = ["nsenter", f"--target={self.pid}", "--all", "env", "-i", "PATH=/usr/sbin:/usr/bin"]
        done = subprocess.run(
            [*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}"
        return done.stdout.strip()

    def show(self, unit: str, *names: str) -> dict[str, str]:
        lines = self.run("systemctl", "show", unit, f"--property={','.join(names)}").splitlines()
        return dict(line.split("=", 1) for line in lines)


@contextmanager
def booted(
    root: Path, work: Path, files: dict[str, str], mounts: dict[Path, str], first: str = SYSTEMD
) -> Iterator[Machine]:
    """A machine over this root, with these files, and with folders of this machine mounted in it.

    ``first`` becomes process 1.
    """
    for name in ("upper", "work", "root"):
        (work / name).mkdir()
    for path, text in {"/etc/systemd/system/test.target": TARGET, **files}.items():
        file = work / "upper" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    arguments = [str(word) for mount in mounts.items() for word in mount]
    with (
        _cgroup(f"test-{os.getpid()}-{work.name}") as join,
        (work / "console").open("wb") as console,
    ):
        joined = ["sh", "-c", f'echo $$ > "{join}" && exec "$@"', "sh", "unshare", *NAMESPACES]
        process = subprocess.Popen(
            [*joined, "sh", "-ec", BOOT + first, "sh", str(root), str(work), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        try:
            answers = (
                ["systemctl", "list-units"] if first == SYSTEMD else ["test", "-e", "/run/mounted"]
            )
            yield _machine(process, answers, work / "console")
        finally:
            process.kill()
            process.wait()


def _machine(process: subprocess.Popen[bytes], answers: list[str], console: Path) -> Machine:
    """Wait until this command succeeds in the machine."""
    give_up_at = time.monotonic() + START_SECONDS
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and time.monotonic() < give_up_at:
        if pids := children.read_text().split():
            machine = Machine(int(pids[0]))
            with suppress(AssertionError):
                machine.run(*answers)
                return machine
        time.sleep(0.1)
    msg = f"the machine did not start: {console.read_text(errors='replace')[-2000:]}"
    raise RuntimeError(msg)


@contextmanager
def _cgroup(name: str) -> Iterator[Path]:
    """The file by which a process joins its own group, which is deleted afterwards."""
    mounted = next(folder for folder in CGROUPS if (folder / "cgroup.procs").exists())
    group = mounted / name
    group.mkdir()
    try:
        yield group / "cgroup.procs"
    finally:
        give_up_at = time.monotonic() + START_SECONDS
        while group.exists():
            for folder in sorted(group.rglob("*/"), reverse=True):
                with suppress(OSError):
                    folder.rmdir()
            with suppress(OSError):  # a process of the group has not ended yet
                group.rmdir()
            assert time.monotonic() < give_up_at, f"{group} is still in use"
            time.sleep(0.05)
