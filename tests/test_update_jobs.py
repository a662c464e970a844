"""The weekly jobs that propose the template's changes: their own steps, on a real remote.

Each job of the rendered file runs in its own checkout, with the variables and secrets that the forge would set,
and gets only the artifact of the other job. GitHub's `gh` is a script that stores pull requests; GitLab makes its
merge requests from push options, which a hook of the remote records.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from support.rendered import QUESTIONS, Render, Result, Service, parse_yaml, run
from support.repositories import (
    IDENTITY,
    LOGS,
    OLD_LINE,
    PRESENT_LINE,
    TREE,
    commit_all,
    git,
    scaffold,
    without_git,
)

pytestmark = without_git
NOBODY = str(1_000_000 + os.getpid())
"""The job ends all processes of this user, so each process of a test run has another user."""
IS_ROOT = sys.platform == "linux" and os.geteuid() == 0

VERSION = QUESTIONS["_template_version"]
WORKFLOW = ".github/workflows/template-update.yml"
GH = """#!/bin/sh
# Remembers what it was asked, and has one open pull request at most.
printf '%s' "$GH_TOKEN" > "$REQUESTS/token"
[ "$1" = auth ] && exit 0
[ "$2" = create ] && [ -e "$REQUESTS/open" ] && { echo "a pull request already exists"; exit 1; }
touch "$REQUESTS/open"
printf '%s\\n' "$@" > "$REQUESTS/last"
"""
SETPRIV = f"""#!/bin/sh
# As the real one, but that this user may also read what only root may here: Python, the template, and the spy's file.
export GIT_CONFIG_GLOBAL="$(dirname "$0")/gitconfig"
exec {shutil.which("setpriv")} --inh-caps +dac_override --ambient-caps +dac_override "$@"
"""
SETPRIV_OF_OTHERS = """#!/bin/sh
# Stands for setpriv where this user may not become another one: runs the command only.
while [ "${1#--}" != "$1" ]; do shift; done
[ "$3" = "kill -KILL -1" ] && exit
exec "$@"
"""
HOOK = """#!/bin/sh
# Writes the push options down, as GitLab would read them.
i=0
while [ "$i" -lt "${GIT_PUSH_OPTION_COUNT:-0}" ]; do
    eval "printf '%s\\n' \\"\\$GIT_PUSH_OPTION_$i\\""
    i=$((i + 1))
done > "$REQUESTS/options"
[ -s "$REQUESTS/options" ] && mv "$REQUESTS/options" "$REQUESTS/last"
exit 0
"""


TOKEN, OWN_TOKEN = "the-token-that-may-write", "the-job-s-own-token"
BOTH = {"github": ("merge", "propose"), "gitlab": ("template-merge", "template-update")}
"""The job that runs the template's code, and the one with the token."""


@dataclass
class Forge:
    """A remote with a service on its branch main, and the jobs that run on it each week."""

    ci: str
    folder: Path
    runs: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    """The outputs of the jobs of the last run, by ``JOB.outputs.NAME``."""

    @property
    def origin(self) -> Path:
        return self.folder / "origin.git"

    @property
    def bundle(self) -> Path:
        """The artifact of the first job."""
        return self.folder / f"artifact-{self.runs}" / self.bundle_name

    @property
    def bundle_name(self) -> str:
        return "update.bundle" if self.ci == "github" else f"update-{self.runs}.bundle"

    @property
    def request(self) -> str:
        """The last proposal: title, text and whether it is a draft."""
        last = self.folder / "requests/last"
        return last.read_text(encoding="utf-8") if last.exists() else ""

    def clone(self, name: str) -> Service:
        git(self.folder, "clone", "--quiet", str(self.origin), name)
        return Service(self.folder / name, "order_events")

    def change(self, file: str, old: str, new: str) -> None:
        """A commit on main."""
        ours = self.clone("ours")
        assert old in ours.read(file)
        ours.write(file, ours.read(file).replace(old, new, 1))
        commit_all(ours.path, "Ours")
        git(ours.path, "push", "--quiet", "origin", "main")

    def run_jobs(self) -> Result:
        """Run both jobs; the second only if the first has succeeded."""
        self.runs += 1
        self.outputs = {}
        first, second = BOTH[self.ci]
        result = self.run_job(first)
        if result.returncode == 0 and self.is_due(second):
            then = self.run_job(second)
            result = Result(then.args, then.returncode, result.stdout + then.stdout)
        return result

    def run_job(self, name: str) -> Result:
        """Run one job in a checkout of one commit, like the forges."""
        one = ("--depth", "1", "--branch", "main", self.origin.as_uri(), f"{name}-{self.runs}")
        git(self.folder, "clone", "--quiet", *one)
        checkout = Service(self.folder / f"{name}-{self.runs}", "order_events")
        sha = git(checkout.path, "rev-parse", "HEAD").strip()
        git(checkout.path, "checkout", "--quiet", "--detach", sha)
        runner = self.folder / f"runner-{name}-{self.runs}"
        runner.mkdir()
        env = {
            "HOME": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{IDENTITY['PATH']}",
            "REQUESTS": str(self.folder / "requests"),
        }
        steps = self.github if self.ci == "github" else self.gitlab
        return steps(name, checkout, env, sha, runner)

    def github(
        self, name: str, checkout: Service, env: dict[str, str], sha: str, runner: Path
    ) -> Result:
        workflow = parse_yaml(checkout.read(WORKFLOW))
        job, outputs = workflow["jobs"][name], dict[str, str]()
        values = {
            "github.token": OWN_TOKEN,
            "secrets.TEMPLATE_UPDATE_TOKEN || github.token": TOKEN,
            "runner.temp": str(runner),
        }

        def evaluated(variables: dict[str, str]) -> dict[str, str]:
            return {
                variable: re.sub(r"\$\{\{ (.+?) \}\}", lambda found: values[found[1]], value)
                for variable, value in variables.items()
            }

        env |= {"GITHUB_SHA": sha, "RUNNER_TEMP": str(runner)}
        env |= {"GITHUB_OUTPUT": str(runner / "output")}
        env |= evaluated({**workflow.get("env", {}), **job.get("env", {})})
        (runner / "output").touch()
        result = Result([], 0, "")
        for step in job["steps"]:
            if "if" in step and not outputs.get(step["if"]):
                continue
            action = step.get("uses", "").partition("@")[0]
            if action == "actions/upload-artifact":
                self.bundle.parent.mkdir()
                shutil.copy(checkout.path / step["with"]["path"], self.bundle)
            elif action == "actions/download-artifact":
                place = evaluated(step["with"]).get("path", checkout.path)
                shutil.copytree(self.bundle.parent, place, dirs_exist_ok=True)
            elif "run" in step:
                variables = {**env, **evaluated(step.get("env", {}))}
                command = ("bash", "-e", "-c", step["run"])  # like the runner without `shell`
                result = run(*command, cwd=checkout.path, check=False, env=variables)
                if result.returncode != 0:
                    return result
                lines = (runner / "output").read_text().splitlines()
                of_step = dict(line.split("=", 1) for line in lines)
                outputs |= (
                    {f"steps.{step['id']}.outputs.{k}": v for k, v in of_step.items()}
                    if lines
                    else {}
                )
            else:
                assert action in ("actions/checkout", "astral-sh/setup-uv")
        for output, expression in job.get("outputs", {}).items():
            found = outputs.get(expression.removeprefix("${{ ").removesuffix(" }}"), "")
            self.outputs[f"needs.{name}.outputs.{output}"] = found
        return result

    def gitlab(
        self, name: str, checkout: Service, env: dict[str, str], sha: str, runner: Path
    ) -> Result:
        jobs = parse_yaml(checkout.read(".gitlab-ci.yml"))
        job = {**jobs.get(jobs[name].get("extends"), {}), **jobs[name]}
        env |= {"CI_COMMIT_SHA": sha, "CI_DEFAULT_BRANCH": "main", "CI_JOB_TOKEN": OWN_TOKEN}
        env |= {k: str(v) for k, v in job.get("variables", {}).items()}
        env |= {"CI_SERVER_HOST": "gitlab.example.com", "PUSH_TO": str(self.origin)}
        env |= {"BUNDLE": self.bundle_name, "CI_REGISTRY_PASSWORD": OWN_TOKEN}
        env |= {"CI_BUILDS_DIR": str(checkout.path), "CI_PROJECT_DIR": str(checkout.path)}
        env |= {"NOBODY": NOBODY} if "NOBODY" in env else {}
        if job.get("environment", {}).get("name") == "template-update":
            env["TEMPLATE_UPDATE_TOKEN"] = TOKEN
        checkout.path.chmod(0o777)  # like runners leave it, with the token of the job in it
        git(checkout.path, "config", "http.extraHeader", f"Authorization: {OWN_TOKEN}")
        folder = checkout.path
        if job.get("variables", {}).get("GIT_STRATEGY") == "none":
            folder = runner
        if "needs" in job and self.bundle.exists():
            shutil.copytree(self.bundle.parent, folder, dirs_exist_ok=True)
        script = ("bash", "-eo", "pipefail", "-c", "\n".join(job["script"]))
        result = run(*script, cwd=folder, check=False, env=env)
        assert checkout.path.stat().st_mode & 0o777 == 0o777, "other jobs may run as other users"
        if "artifacts" in job and (folder / self.bundle_name).exists():
            self.bundle.parent.mkdir()
            shutil.copy(folder / self.bundle_name, self.bundle)
        return result

    def is_due(self, name: str) -> bool:
        if self.ci == "gitlab":
            return True
        [checkout] = self.folder.glob(f"merge-{self.runs}")
        condition = parse_yaml((checkout / WORKFLOW).read_text("utf-8"))["jobs"][name]["if"]
        return bool(self.outputs[condition])

    def branches(self) -> set[str]:
        return set(git(self.origin, "for-each-ref", "--format=%(refname:short)").split())

    def proposed(self, file: str) -> str:
        return git(self.origin, "show", f"template-update:{file}")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Outside of pytest's own folder, to which each pytest that starts restricts access."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="module", params=["github", "gitlab"])
def as_scaffolded(
    request: pytest.FixtureRequest, template: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Service]:
    """Answers with this CI provider."""
    folder, answer = tmp_path_factory.mktemp("old"), f"ci={request.param}"
    return request.param, scaffold(template, folder, "--checkout", "v0.0.1", answer)


@pytest.fixture
def own_template(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "template/cookiecutter-consumer", symlinks=True)


@pytest.fixture
def forge(
    as_scaffolded: tuple[str, Service], template: Path, own_template: Path, tmp_path: Path
) -> Forge:
    ci, service = as_scaffolded[0], as_scaffolded[1].copy_to(tmp_path)
    recorded = service.read(".template-answers.json")
    assert template.as_uri() in recorded
    service.write(
        ".template-answers.json", recorded.replace(template.as_uri(), own_template.as_uri())
    )
    git(service.path, "commit", "--quiet", "--all", "--amend", "--no-edit")
    git(service.path, "branch", "--quiet", "--move", "main")
    git(tmp_path, "clone", "--quiet", "--bare", str(service.path), "origin.git")
    forge = Forge(ci, tmp_path)
    git(forge.origin, "config", "receive.advertisePushOptions", "true")
    for folder, name, text in (
        ("bin", "gh", GH),
        ("bin", "gitconfig", "[safe]\n\tdirectory = *\n"),
        ("bin", "setpriv", SETPRIV if IS_ROOT else SETPRIV_OF_OTHERS),
        ("origin.git/hooks", "pre-receive", HOOK),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
        (tmp_path / folder / name).chmod(0o755)
    (tmp_path / "requests").mkdir()
    if ci == "gitlab" and IS_ROOT:
        for place in (tmp_path, own_template):
            place.chmod(place.stat().st_mode | 0o055)  # readable for another user, as on a forge
    return forge


def test_what_changed_is_proposed_each_week_until_it_is_merged(forge: Forge) -> None:
    forge.change("README.md", "# Order events", "# Order events of ours")
    for _ in range(2):  # in the second week the first proposal is still open
        result = forge.run_jobs()
        assert result.returncode == 0, result.stdout
        assert f"Template {VERSION}" in forge.request
        assert "raft" not in forge.request
        assert PRESENT_LINE in forge.proposed(LOGS)
        assert "# Order events of ours" in forge.proposed("README.md")
        assert json.loads(forge.proposed(".template-answers.json"))["version"] == VERSION
        assert forge.branches() == {"main", "template-update"}
    git(forge.origin, "update-ref", "refs/heads/main", "template-update")
    (forge.folder / "requests/last").unlink()
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert "The template has not changed." in result.stdout
    assert forge.request == ""


def test_what_was_squashed_is_not_proposed_again(forge: Forge) -> None:
    forge.run_jobs()
    squashed = git(
        forge.origin, "commit-tree", "template-update^{tree}", "-p", "main", "-m", "Squashed"
    )
    git(forge.origin, "update-ref", "refs/heads/main", squashed.strip())
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert "The template has not changed." in result.stdout


def test_conflicts_are_proposed_as_a_draft_that_names_them_and_the_job_fails(forge: Forge) -> None:
    forge.change(LOGS, OLD_LINE, '"""Ours."""')
    for _ in range(2):
        result = forge.run_jobs()
        assert result.returncode == 1, result.stdout
        assert LOGS in result.stdout.splitlines()[-1]
        assert LOGS in forge.request
        assert "with conflicts" in forge.request
        assert "<<<<<<< HEAD" in forge.proposed(LOGS)
    assert ("--draft" if forge.ci == "github" else "title=Draft: ") in request_of_another_run(forge)
    open_conflicts = forge.clone("reviewed")
    git(open_conflicts.path, "switch", "--quiet", "template-update")
    found = run(
        "bash", "-e", "-c", guard(open_conflicts, forge.ci), cwd=open_conflicts.path, check=False
    )
    assert found.returncode == 1
    assert found.stdout.removeprefix("./").startswith(f"{LOGS}:")


def request_of_another_run(forge: Forge) -> str:
    """The job's request when no request is open."""
    (forge.folder / "requests/open").unlink(missing_ok=True)
    forge.run_jobs()
    return forge.request


def guard(service: Service, ci: str) -> str:
    """The step of the ordinary checks that detects the marks of a conflict."""
    if ci == "github":
        steps: list[Any] = parse_yaml(service.read(".github/workflows/ci.yml"))["jobs"]["lint"][
            "steps"
        ]
        return next(str(step["run"]) for step in steps if "<<<" in step.get("run", ""))
    return next(
        str(step)
        for step in parse_yaml(service.read(".gitlab-ci.yml"))["lint"]["script"]
        if "<<<" in step
    )


def push_of_a_reviewer(forge: Forge) -> str:
    ours = forge.clone("reviewing")
    git(ours.path, "switch", "--quiet", "template-update")
    ours.write("README.md", "Reviewed\n")
    commit_all(ours.path, "Mend what the update breaks")
    git(ours.path, "push", "--quiet", "origin", "template-update")
    return git(ours.path, "rev-parse", "HEAD")


def test_a_commit_of_a_reviewer_is_never_overwritten(forge: Forge) -> None:
    assert forge.run_jobs().returncode == 0
    reviewed, asked = push_of_a_reviewer(forge), forge.request
    (forge.folder / "requests/last").unlink()
    result = forge.run_jobs()
    assert result.returncode == 1
    assert "template-update ends with a commit that is not of this job" in result.stdout
    assert git(forge.origin, "rev-parse", "template-update") == reviewed
    assert forge.request == ""
    git(forge.origin, "branch", "--delete", "--force", "template-update")
    (forge.folder / "requests/open").unlink(missing_ok=True)  # a forge closes it with the branch
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert forge.request == asked


def test_a_commit_that_arrives_while_the_job_runs_is_not_overwritten(forge: Forge) -> None:
    """Between the look at the branch and the push: the fake git pushes there, as a reviewer."""
    assert forge.run_jobs().returncode == 0
    reviewed = push_of_a_reviewer(forge).strip()
    mine = git(forge.origin, "rev-parse", f"{reviewed}~1").strip()
    git(forge.origin, "update-ref", "refs/heads/template-update", mine)
    (forge.folder / "bin/git").write_text(
        f"""#!/bin/sh
[ "$1" = push ] && {shutil.which("git")} -C {forge.origin} update-ref refs/heads/template-update {reviewed}
exec {shutil.which("git")} "$@"
"""
    )
    (forge.folder / "bin/git").chmod(0o755)
    result = forge.run_jobs()
    assert result.returncode != 0
    assert "stale info" in result.stdout
    assert git(forge.origin, "rev-parse", "template-update").strip() == reviewed


def test_a_forge_that_refuses_changed_workflows_gets_no_proposal(
    forge: Forge, own_template: Path, tmp_path: Path
) -> None:
    """GitHub refuses a token without that right: its sentence is the job's last, and no request is opened."""

    def change(fork: Path) -> None:
        for file in (WORKFLOW, ".gitlab-ci.yml"):
            path = fork / TREE / file
            path.write_text(path.read_text("utf-8") + "# Changed\n", "utf-8")

    from_template(forge, release_template(own_template, tmp_path, change))
    hook = forge.origin / "hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho refusing to allow it without workflows permission\nexit 1\n")
    result = forge.run_jobs()
    assert result.returncode != 0
    assert "without workflows permission" in result.stdout
    assert forge.branches() == {"main"}
    assert forge.request == ""


def test_an_unavailable_template_fails_the_job_and_no_change_is_proposed(forge: Forge) -> None:
    forge.change(".template-answers.json", "cookiecutter-consumer", "cookiecutter-nowhere")
    result = forge.run_jobs()
    assert result.returncode == 1
    assert "update.py: no update from " in result.stdout
    assert (forge.branches(), forge.request) == ({"main"}, "")


# -- the abilities of the template's own code

SPY = """
import os, pathlib
_pid, _seen = os.getpid(), [repr(dict(os.environ))]
while _pid > 1:
    try:
        _seen.append(repr(pathlib.Path(f"/proc/{_pid}/environ").read_bytes()))
        _status = pathlib.Path(f"/proc/{_pid}/status").read_text()
    except OSError:
        break
    _pid = int(_status.partition("PPid:")[2].split()[0])
for _one in os.listdir("/proc") if os.geteuid() else ():  # root could read those of other tests
    try:
        _seen.append(repr(pathlib.Path(f"/proc/{_one}/environ").read_bytes()))
    except OSError:
        pass
for _one in pathlib.Path(SEEN).parent.glob("template-merge-*"):
    _seen.append(f"user {os.geteuid()}, the folder of the job: {oct(_one.stat().st_mode)}")
with open(SEEN, "a") as _file:
    print(__file__, *_seen, sep="\\n", file=_file)
"""


def release_template(template: Path, folder: Path, changes: Callable[[Path], object]) -> Path:
    """A clone of the template, with one more release."""
    git(folder, "clone", "--quiet", str(template), "fork")
    fork = folder / "fork"
    changes(fork)
    commit_all(fork, "Changed")
    git(fork, "tag", "v0.9.0")
    return fork


def from_template(forge: Forge, place: Path) -> None:
    ours = forge.clone("moved")
    recorded = json.loads(ours.read(".template-answers.json"))
    ours.write(".template-answers.json", json.dumps({**recorded, "template": str(place)}, indent=2))
    commit_all(ours.path, "The template has moved")
    git(ours.path, "push", "--quiet", "origin", "main")


def test_a_hook_of_the_template_sees_no_token(
    forge: Forge, own_template: Path, tmp_path: Path
) -> None:
    """Neither in its own environment nor in that of a parent process."""
    seen = tmp_path / "seen"
    spy = SPY.replace("SEEN", repr(str(seen)))

    def plant(fork: Path) -> None:
        for name in ("hooks/post_gen_project.py", "tools/updating.py"):
            text = (fork / name).read_text("utf-8")
            marked = text.replace("import json\n", f"import json\n{spy}\n", 1)
            assert marked != text
            (fork / name).write_text(marked, "utf-8")

    from_template(forge, release_template(own_template, tmp_path, plant))
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    dump = seen.read_text("utf-8")
    assert "updating.py" in dump
    assert dump.count("PATH=") > 6, "of the hooks of two renders and of the program, and above"
    assert TOKEN not in dump
    if forge.ci == "github" or IS_ROOT:
        assert OWN_TOKEN not in dump
    if forge.ci == "gitlab":
        assert "the folder of the job: 0o40700" in dump, "which has the token, too"
        assert IS_ROOT is (f"user {NOBODY}," in dump)
    if forge.ci == "github":
        assert (forge.folder / "requests/token").read_text() == TOKEN, "the second job has it"
    assert f"Template {VERSION}" in forge.request


def test_a_workflow_that_the_template_changed_is_proposed(
    forge: Forge, own_template: Path, tmp_path: Path
) -> None:
    file = WORKFLOW if forge.ci == "github" else ".gitlab-ci.yml"

    def change(fork: Path) -> None:
        path = fork / TREE / file
        path.write_text(path.read_text("utf-8") + "# Changed\n", "utf-8")

    from_template(forge, release_template(own_template, tmp_path, change))
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert forge.proposed(file).endswith("# Changed\n")


def other_branch(repository: Path, base: str) -> list[str]:
    return ["main"]


def one_more_branch(repository: Path, base: str) -> list[str]:
    git(repository, "branch", "main-2", "template-update")
    return ["template-update", "main-2", f"^{base}"]


def a_tag(repository: Path, base: str) -> list[str]:
    git(repository, "checkout", "--quiet", "--detach")
    git(repository, "tag", "template-update", "template-update")
    git(repository, "branch", "--delete", "--force", "template-update")
    return ["refs/tags/template-update", f"^{base}"]


def without_history(repository: Path, base: str) -> list[str]:
    tree = f"{base}^{{tree}}"
    commit = git(repository, "commit-tree", tree, "-m", "Orphan").strip()
    git(repository, "update-ref", "refs/heads/template-update", commit)
    return ["template-update"]


def with_foreign_history(repository: Path, base: str) -> list[str]:
    without_history(repository, base)
    both = ("-p", base, "-p", "template-update", "-m", "Merged")
    commit = git(repository, "commit-tree", f"{base}^{{tree}}", *both).strip()
    git(repository, "update-ref", "refs/heads/template-update", commit)
    return ["template-update", f"^{base}"]


def of_another_base(repository: Path, base: str) -> list[str]:
    for parents in ([], ["-p", "template-update"]):
        commit = git(repository, "commit-tree", f"{base}^{{tree}}", *parents, "-m", "x").strip()
        git(repository, "update-ref", "refs/heads/template-update", commit)
    return ["template-update", "^template-update~1"]


HOSTILE = [
    *(other_branch, one_more_branch, a_tag),
    *(without_history, with_foreign_history, of_another_base),
]


def test_the_job_with_the_token_refuses_a_bundle_of_anything_else(forge: Forge) -> None:
    first, second = BOTH[forge.ci]
    forge.runs = 1
    assert forge.run_job(first).returncode == 0
    good, base = forge.bundle.read_bytes(), git(forge.origin, "rev-parse", "main").strip()
    fetched = (
        "fetch",
        "--quiet",
        "--update-head-ok",
        str(forge.bundle),
        "+template-update:template-update",
    )
    before = git(forge.origin, "for-each-ref")
    for hostile in HOSTILE:
        forge.runs += 1
        forge.bundle.parent.mkdir()
        repository = forge.folder / hostile.__name__
        shutil.copytree(forge.folder / f"{first}-1", repository)
        git(repository, *fetched)
        git(repository, "branch", "--force", "main", base)
        revisions = hostile(repository, base)
        git(repository, "bundle", "create", "--quiet", str(forge.bundle), *revisions)
        assert forge.run_job(second).returncode != 0, hostile.__name__
    forge.runs += 1
    forge.bundle.parent.mkdir()
    forge.bundle.write_bytes(b"#!/bin/sh\n")
    assert forge.run_job(second).returncode != 0
    assert git(forge.origin, "for-each-ref") == before
    assert forge.request == ""

    forge.runs += 1
    ran = forge.folder / "ran"
    planted = forge.bundle.parent / ".git/config"  # the first job fills the artifact with any files
    planted.parent.mkdir(parents=True)
    planted.write_text(f"[core]\n\tfsmonitor = touch {ran}\n\tsshCommand = touch {ran}\n")
    forge.bundle.write_bytes(good)
    result = forge.run_job(second)
    assert result.returncode == 0, result.stdout
    assert forge.branches() == {"main", "template-update"}
    assert not ran.exists()


def test_the_job_with_the_token_runs_no_hook_when_it_pushes(forge: Forge) -> None:
    hooks, ran = forge.folder / "hooks", forge.folder / "ran"
    hooks.mkdir()
    (hooks / "pre-push").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (hooks / "pre-push").chmod(0o755)
    (forge.folder / ".gitconfig").write_text(f"[core]\n\thooksPath = {hooks}\n")
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert forge.branches() == {"main", "template-update"}
    assert not ran.exists()
    ours = forge.clone("pushing")
    run("git", "push", "-q", "origin", "main:x", cwd=ours.path, env={"HOME": str(forge.folder)})
    assert ran.exists(), "it would have run"


def test_a_security_release_is_named_by_title_and_text(
    forge: Forge, own_template: Path, tmp_path: Path
) -> None:
    def mend(fork: Path) -> None:
        for name, old, new in (
            (
                "CHANGELOG.md",
                "## 0.1.0",
                "## 0.9.0 (2026-12-01)\n\n### Security\n\n- A.\n\n## 0.1.0",
            ),
            ("cookiecutter.json", f'"{VERSION}"', '"0.9.0"'),
        ):
            text = (fork / name).read_text("utf-8")
            assert old in text
            (fork / name).write_text(text.replace(old, new, 1), "utf-8")

    from_template(forge, release_template(own_template, tmp_path, mend))
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert "Template 0.9.0, a security update" in forge.request
    assert "Vulnerabilities were mended in 0.9.0" in forge.request


# -- uv.lock


def test_the_lock_is_upgraded_with_a_cooldown_of_a_week(forge: Forge) -> None:
    """For all packages, including those not in pyproject.toml; and each later `uv lock` finds it up to date."""
    ours = forge.clone("locked")
    run("uv", "lock", "--upgrade-package", "idna==3.7", cwd=ours.path)
    assert versions(ours)["idna"] == "3.7"
    assert not any(one.startswith("idna") for one in ours.metadata["project"]["dependencies"])
    commit_all(ours.path, "A lock")
    git(ours.path, "push", "--quiet", "origin", "main")
    result = forge.run_jobs()
    assert result.returncode == 0, result.stdout
    assert f"Template {VERSION}, Newer versions in uv.lock" in forge.request
    git(ours.path, "pull", "--quiet", "origin", "template-update")
    assert versions(ours)["idna"] != "3.7"
    files = re.findall(r'upload-time = "([^"]+)"', ours.read("uv.lock"))
    newest = max(datetime.fromisoformat(time) for time in files)
    assert newest < datetime.now(UTC) - timedelta(days=7)
    run("uv", "lock", "--check", cwd=ours.path)


def versions(service: Service) -> dict[str, str]:
    packages = tomllib.loads(service.read("uv.lock"))["package"]
    return {package["name"]: package["version"] for package in packages}


def test_the_jobs_run_weekly_or_where_they_are_asked_for_and_may_no_more_than_they_must(
    render: Render,
) -> None:
    workflow = parse_yaml(render(ci="github").read(WORKFLOW))
    assert workflow["on"].keys() == {"schedule", "workflow_dispatch"}
    assert workflow["permissions"] == {}
    assert {name: job["permissions"] for name, job in workflow["jobs"].items()} == {
        "merge": {"contents": "read"},
        "propose": {"contents": "write", "pull-requests": "write"},
    }
    assert "secrets." not in json.dumps(workflow["jobs"]["merge"])
    assert workflow["jobs"]["propose"]["environment"] == "template-update"
    jobs = parse_yaml(render(ci="gitlab").read(".gitlab-ci.yml"))
    [rule] = jobs[".template-update"]["rules"]
    assert rule == {"if": '$CI_PIPELINE_SOURCE == "schedule" && $TEMPLATE_UPDATE == "true"'}
    assert "environment" not in jobs["template-merge"]
    assert jobs["template-update"]["environment"] == {"name": "template-update", "action": "access"}


def test_the_job_with_the_token_runs_only_git_and_the_forge_s_tool(render: Render) -> None:
    steps = parse_yaml(render(ci="github").read(WORKFLOW))["jobs"]["propose"]["steps"]
    gitlab = parse_yaml(render(ci="gitlab").read(".gitlab-ci.yml"))["template-update"]
    assert "before_script" not in gitlab
    harmless = {
        "test",
        "cut",
        "paste",
        "sed",
        "tr",
        "echo",
        "set",
        "cd",
        "mktemp",
        "exit",
        "printf",
    }
    for script in ("\n".join(step.get("run", "") for step in steps), "\n".join(gitlab["script"])):
        code = re.sub(r"#.*|\\\n", "", script)
        commands = set(re.findall(r"(?:^|\$\(|[|;&] |then |! )\s*([a-z][\w-]*)(?= |$)", code, re.M))
        commands -= {"if", "fi", "then"}
        assert commands - harmless <= {"git", "gh"}
        assert "git" in commands
