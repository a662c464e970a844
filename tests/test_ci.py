"""CI files: those of every broker, and the template's own, are valid, pinned and of least privilege, and work."""

import ast
import json
import os
import re
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from support.rendered import QUESTIONS, TEMPLATE, Prove, Render, Result, Service, parse_yaml, run

WORKFLOW, DEPENDABOT = ".github/workflows/ci.yml", ".github/dependabot.yml"
RELEASE, UPDATE = ".github/workflows/release.yml", ".github/workflows/template-update.yml"
GITLAB, RENOVATE = ".gitlab-ci.yml", "renovate.json"
SCHEMAS = {
    WORKFLOW: ["vendor.github-workflows"],
    RELEASE: ["vendor.github-workflows"],
    UPDATE: ["vendor.github-workflows"],
    DEPENDABOT: ["vendor.dependabot"],
    GITLAB: ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
    RENOVATE: ["vendor.renovate"],
}
ACTION = re.compile(r"uses: (\S+)@(\S+)(?: # (\S+))?$", re.M)
ZIZMOR_SETTINGS = "rules: {}\n"  # an accepted finding is named in its own line, with the reason

CI = [ci for ci in QUESTIONS["ci"] if ci != "none"]
BROKERS = pytest.mark.parametrize("broker", QUESTIONS["broker"])


def has_schema(file: str, *folders: Path) -> Result:
    check = ["check-jsonschema", "--verbose", "--builtin-schema", *SCHEMAS[file]]
    files = [str(folder / file) for folder in folders]
    return run(*check, *files, cwd=TEMPLATE, check=False)


def zizmor(settings: Path, *folders: Path) -> Result:
    settings.write_text(ZIZMOR_SETTINGS)
    check = ["zizmor", "--offline", "--no-progress", "--pedantic", "--strict-collection"]
    checked = [str(folder / ".github") for folder in folders]
    return run(*check, "--config", str(settings), *checked, cwd=TEMPLATE, check=False)


def actionlint(*folders: Path, shellcheck: Path | str = "") -> Result:
    files = [str(path) for folder in folders for path in (folder / ".github/workflows").glob("*")]
    return run("actionlint", f"-shellcheck={shellcheck}", *files, cwd=TEMPLATE, check=False)


def parsed(folder: Path, file: str) -> Any:
    return parse_yaml((folder / file).read_text("utf-8"))


EACH_DEPLOY_AND_CI = pytest.mark.parametrize(("deploy", "ci"), [*product(QUESTIONS["deploy"], CI)])


@EACH_DEPLOY_AND_CI
def test_the_files_of_a_service_are_valid(
    render: Render, prove: Prove, tmp_path: Path, deploy: str, ci: str
) -> None:
    """With each broker."""
    files = QUESTIONS["_cis"][ci]
    folders = []
    for broker in QUESTIONS["broker"]:
        service = render(broker=broker, deploy=deploy, ci=ci)
        without = render(broker=broker, deploy=deploy, ci="none")
        assert service.files.keys() - without.files.keys() == set(files)
        folders.append(service.path)
    for file in files:
        result = has_schema(file, *folders)
        assert result.returncode == 0, result.stdout
    if ci == "github":
        result = zizmor(tmp_path / "zizmor.yml", *folders)
        assert result.returncode == 0, result.stdout
        result = actionlint(*folders)
        assert result.returncode == 0, result.stdout
    for _ in folders:
        prove("CI files that are valid", f"ci={ci}")


def shellcheck_of_gitlab(service: Service, program: Path) -> str:
    """ShellCheck's report on the scripts, each like GitLab runs it: until the first command that fails."""
    said = ""
    for name, job in parsed(service.path, GITLAB).items():
        if name not in ("workflow", "default", "variables"):
            lines = [*job.get("before_script", []), *job.get("script", [])]
            shell = "sh" if job.get("extends") == ".image" or name == "attest" else "bash"
            check = [str(program), "--severity=warning", f"--shell={shell}", "-"]
            script = "\n".join(["set -e", *lines])
            said += run(*check, cwd=service.path, check=False, stdin=script).stdout
    return said


@pytest.mark.very_slow
@EACH_DEPLOY_AND_CI
def test_the_scripts_of_ci_pass_a_linter(
    render: Render, reviewers: Path, deploy: str, ci: str
) -> None:
    """With each broker that has its own commands."""
    brokers = ("rabbitmq", "kafka", "mqtt")
    services = [render(broker=broker, deploy=deploy, ci=ci) for broker in brokers]
    program = reviewers / "shellcheck"
    if ci == "github":
        folders = [service.path for service in services]
        assert actionlint(*folders, shellcheck=program).stdout == ""
    else:
        assert "".join(shellcheck_of_gitlab(service, program) for service in services) == ""


@pytest.mark.very_slow
@pytest.mark.parametrize("ci", CI)
def test_the_linter_of_scripts_sees(render_own: Render, reviewers: Path, ci: str) -> None:
    service, program = render_own(ci=ci), reviewers / "shellcheck"
    if ci == "github":
        spoil(service, UPDATE, r'"\$GITHUB_SHA\.\.template-update"', "$(cat sha)..template-update")
        found = actionlint(service.path, shellcheck=program).stdout
    else:
        spoil(service, GITLAB, r'chmod 700 "\$CI_BUILDS_DIR"', "chmod 700 $(ls /builds)")
        found = shellcheck_of_gitlab(service, program)
    assert "SC2046" in found


def test_no_ci_files_are_left_without_a_ci_provider(render: Render) -> None:
    assert not render(ci="none").has(".github")


def test_the_files_of_the_template_are_valid(tmp_path: Path) -> None:
    for file in (WORKFLOW, RELEASE, DEPENDABOT):
        result = has_schema(file, TEMPLATE)
        assert result.returncode == 0, result.stdout
    result = zizmor(tmp_path / "zizmor.yml", TEMPLATE)
    assert result.returncode == 0, result.stdout
    result = actionlint(TEMPLATE)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("needs: \\[lint, test\\]", "needs: [lint, tests]", "needs job"),
        ("github.event_name == 'push'", "github.event_nam == 'push'", "event_nam"),
        ("matrix.python }}", "matrix.pythons }}", "pythons"),
    ],
)
def test_actionlint_sees(render_own: Render, right: str, wrong: str, finding: str) -> None:
    service = render_own(ci="github")
    spoil(service, WORKFLOW, right, wrong)
    assert finding in actionlint(service.path).stdout


@pytest.mark.parametrize(
    ("ci", "file", "right", "wrong"),
    [
        pytest.param("github", WORKFLOW, "runs-on:", "run-on:", id="workflow"),
        pytest.param("github", DEPENDABOT, "interval: weekly", "interval: often", id="Dependabot"),
        pytest.param("gitlab", GITLAB, "script:", "scripts:", id="GitLab"),
        pytest.param("gitlab", RENOVATE, '"update-lockfile"', '"update-all"', id="Renovate"),
    ],
)
def test_the_check_of_a_schema_sees(
    render_own: Render, ci: str, file: str, right: str, wrong: str
) -> None:
    service = render_own(ci=ci)
    spoil(service, file, right, wrong)
    assert has_schema(file, service.path).returncode == 1


@pytest.mark.parametrize(
    ("file", "right", "wrong", "finding"),
    [
        (WORKFLOW, r"checkout@\w+ # v[\d.]+", "checkout@v7", "unpinned-uses"),
        (WORKFLOW, "persist-credentials: false", "fetch-depth: 1", "artipacked"),
        (WORKFLOW, "# pushes the image", "", "undocumented-permissions"),
        (WORKFLOW, "permissions: {}", "permissions: write-all", "excessive-permissions"),
        (WORKFLOW, r"(?s)concurrency:.*?\n\n", "", "concurrency-limits"),
        (WORKFLOW, "uv run mypy", "echo ${{ github.head_ref }}", "template-injection"),
        (DEPENDABOT, r"    cooldown: .*\n", "", "dependabot-cooldown"),
    ],
)
def test_the_check_of_security_sees(
    render_own: Render, tmp_path: Path, file: str, right: str, wrong: str, finding: str
) -> None:
    service = render_own(ci="github")
    spoil(service, file, right, wrong)
    assert f"[{finding}]" in zizmor(tmp_path / "zizmor.yml", service.path).stdout


def spoil(service: Service, file: str, right: str, wrong: str) -> None:
    before = service.read(file)
    service.write(file, re.sub(right, wrong, before))
    assert service.read(file) != before


def test_actions_are_pinned_by_commit_and_the_same_everywhere(render: Render) -> None:
    service = render(ci="github")
    ours = [
        action
        for file in (WORKFLOW, RELEASE)
        for action in ACTION.findall((TEMPLATE / file).read_text("utf-8"))
    ]
    theirs = [
        action for file in (WORKFLOW, UPDATE) for action in ACTION.findall(service.read(file))
    ]
    for action, commit, version in ours + theirs:
        assert re.fullmatch("[0-9a-f]{40}", commit), action
        assert re.fullmatch(r"v\d+\.\d+\.\d+", version), action
    assert len({action for action, *_ in ours + theirs}) == len({*ours, *theirs})


@pytest.mark.parametrize("folder", ["the template", "a service"])
def test_jobs_have_a_time_limit_and_may_only_read(render: Render, folder: str) -> None:
    workflow = parsed(TEMPLATE if folder == "the template" else render(ci="github").path, WORKFLOW)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        publishes = {"packages": "write", "id-token": "write", "attestations": "write"}
        may = {"contents": "read", **(publishes if name == "publish" else {})}
        assert job["permissions"] == may
        assert job["timeout-minutes"] <= 120


# -- the jobs for each event

SECONDS = {"lint": 60, "test": 60, "audit": 30, "publish": 90}
"""The longest time of a job from its start to its end, with checkout, downloads, broker and image.

In it, lint and types used 6 seconds of a processor, and the tests 30, by `time uv run ...` in a default service.
"""
MINUTES_OF_A_PUSH = 5


@pytest.fixture
def github(render: Render) -> Any:
    return parsed(render(ci="github").path, WORKFLOW)


def evaluated(expression: str, event: str, **more: object) -> Any:
    """The value of an expression, in the small part of GitHub's expressions that the workflow uses."""
    text = re.sub(r"^\$\{\{(.*)\}\}$", r"\1", expression.strip())
    for theirs, ours in {"&&": " and ", "||": " or ", "github.": "github_"}.items():
        text = text.replace(theirs, ours)
    text = text.replace("github_event.number", "github_event_number")
    names = {"github_event_name": event, "fromJSON": json.loads, **more}
    return eval(text, {"__builtins__": {}}, names)


def pythons_by_job(workflow: Any, event: str) -> dict[str, list[str]]:
    """The jobs that an event starts, each with its Python versions."""
    found = {}
    for name, job in workflow["jobs"].items():
        if evaluated(job.get("if", "True"), event):
            matrix = job.get("strategy", {}).get("matrix", {}).get("python", '["3.14"]')
            found[name] = evaluated(matrix, event) if "fromJSON" in matrix else json.loads(matrix)
    return found


def test_a_change_is_checked_on_the_oldest_and_the_newest_python_and_weekly_on_all(
    github: Any,
) -> None:
    assert github["on"].keys() == {"push", "pull_request", "merge_group", "schedule"}
    assert github["on"]["push"] == {"branches": ["main"], "tags": ["v*"]}
    change = {"lint": ["3.14"], "test": ["3.11", "3.14"]}
    for event in ("pull_request", "merge_group"):
        assert pythons_by_job(github, event) == change
    on_main = {**change, "audit": ["3.14"], "publish": ["3.14"]}
    assert pythons_by_job(github, "push") == on_main
    every = [f"3.{minor}" for minor in range(11, 15)]
    assert pythons_by_job(github, "schedule") == {**on_main, "test": every}
    assert github["jobs"]["publish"]["needs"] == ["lint", "test"]


@pytest.mark.parametrize("event", ["pull_request", "merge_group", "push"])
def test_a_push_costs_less_than_five_minutes_of_machine_time(github: Any, event: str) -> None:
    jobs = pythons_by_job(github, event)
    assert sum(SECONDS[name] * len(pythons) for name, pythons in jobs.items()) <= (
        MINUTES_OF_A_PUSH * 60
    )


def test_only_the_run_of_an_older_push_to_the_same_pull_request_is_cancelled(github: Any) -> None:
    group = github["concurrency"]["group"].replace("${{ github.workflow }}-", "")

    def group_of(event: str, number: object, run_id: int) -> object:
        more = {"github_event_number": number, "github_run_id": run_id}
        return evaluated(group, event, **more)

    assert group_of("pull_request", 7, 1) == group_of("pull_request", 7, 2)
    assert group_of("pull_request", 7, 1) != group_of("pull_request", 8, 2)
    assert group_of("push", None, 1) != group_of("push", None, 2)
    assert github["concurrency"]["cancel-in-progress"] is True


def runs(job: Any, **variables: str) -> bool:
    """Whether GitLab adds the job to a pipeline with these variables; for the small part of rules that is used."""
    rules = [rule["if"] for rule in job.get("rules", [{"if": '"" == ""'}])]
    for rule in rules:
        text = rule.replace("&&", " and ").replace("||", " or ")
        text = re.sub(r"\$(\w+)", lambda name: repr(variables.get(name[1], "")), text)
        if eval(text, {"__builtins__": {}}):
            return True
    return False


@pytest.mark.parametrize("deploy", QUESTIONS["deploy"])
def test_gitlab_runs_the_same_for_the_same_reasons(render: Render, deploy: str) -> None:
    pipeline = parsed(render(ci="gitlab", deploy=deploy).path, GITLAB)
    jobs = {
        name: {**pipeline.get(job.get("extends", ""), {}), **job}
        for name, job in pipeline.items()
        if {"script", "extends"} & {*job} and not name.startswith(".")
    }
    always, later = {"lint", "types", "test"}, {"audit"}
    change, published = set(), set()
    if deploy in ("kubernetes", "compose"):
        later, change, published = {"audit", "bill-of-materials"}, {"container"}, {"publish"}
    registry = {"CI_REGISTRY_IMAGE": "registry.example.com/team/orders"}

    def started(source: str, **variables: str) -> set[str]:
        here = {"CI_PIPELINE_SOURCE": source, **registry, **variables}
        return {name for name, job in jobs.items() if runs(job, **here)}

    assert started("merge_request_event") == always | change
    assert started("push") == always | later | published
    assert started("schedule") == always | later | published | {"test-weekly"}
    assert started("push", CI_REGISTRY_IMAGE="") == always | later
    for visibility, attest, signs in (
        ("public", "", True),
        ("private", "", False),
        ("private", "yes", True),
    ):
        com = {
            "CI_SERVER_HOST": "gitlab.com",
            "CI_PROJECT_VISIBILITY": visibility,
            "ATTEST": attest,
        }
        signed = {"attest"} if published and signs else set()
        assert started("push", **com) == always | later | published | signed
    for source in ("merge_request_event", "push"):  # a runner that cannot build it blocks nothing
        assert not started(source, IMAGE_BUILDS="no") & (change | published)
    assert pipeline["workflow"]["auto_cancel"] == {"on_new_commit": "none"}
    change_rule, *others = pipeline["workflow"]["rules"]
    assert change_rule["auto_cancel"] == {"on_new_commit": "interruptible"}
    assert not any("auto_cancel" in rule for rule in others)
    for job in jobs.values():  # BuildKit without root needs no privileged runner
        assert "dind" not in str(job)
        for script in job["script"]:
            run("sh", "-n", "-c", script, cwd=TEMPLATE)
    assert jobs["test-weekly"]["parallel"]["matrix"] == [{"PYTHON": ["3.12", "3.13"]}]
    assert {*jobs.get("publish", {}).get("needs", [])} <= jobs.keys()


@pytest.mark.parametrize("ci", CI)
def test_the_bill_of_materials_is_valid_and_names_the_vendored_runtime(
    render_own: Render, ci: str
) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed, as it is on GitHub's runners")
    service = render_own(ci=ci)
    run("uv", "lock", "--quiet", cwd=service.path)
    if ci == "github":
        [publish] = [
            step["run"]
            for step in parsed(service.path, WORKFLOW)["jobs"]["publish"]["steps"]
            if "run" in step
        ]
        found = re.search(r"(?ms)^uv export.* > sbom\.json$", publish)
        assert found
        script, folder = found[0], service.path / "published"
        folder.mkdir()
    else:
        script = "\n".join(parsed(service.path, GITLAB)["bill-of-materials"]["script"])
        folder = service.path
    run("sh", "-ec", script, cwd=folder)
    bill = json.loads((folder / "sbom.json").read_text("utf-8"))
    for one in bill["components"]:  # with the addresses of all wheels, the check takes minutes
        one["externalReferences"] = one.get("externalReferences", [])[:1]
    assert JsonStrictValidator(SchemaVersion.V1_5).validate_str(json.dumps(bill)) is None
    assert bill["metadata"]["component"]["name"] == "order-events"
    [runtime] = [one for one in bill["components"] if one["name"] == "cookiecutter-consumer"]
    version = QUESTIONS["_template_version"]
    assert runtime["version"] == version
    assert runtime["purl"] == f"pkg:github/OWNER/cookiecutter-consumer@v{version}"
    assert runtime["licenses"] == [{"license": {"id": "0BSD"}}]
    names = {one["name"] for one in bill["components"]}
    assert {"aio-pika", "pydantic-core", "yarl"} <= names
    assert "pytest" not in names
    assert len({one["bom-ref"] for one in bill["components"]}) == len(bill["components"])


DOCKER = """#!/bin/bash
case $1 in login) cat > /dev/null;; inspect) echo "${@: -1:1}" | sed 's/:main-7$/@sha256:'$DIGEST'/';; esac
"""
"""Reports that a pushed image has this digest."""


@pytest.mark.parametrize("ci", CI)
def test_the_job_that_publishes_an_image_says_how_an_overlay_gets_its_digest(
    render: Render, tmp_path: Path, ci: str
) -> None:
    service = render(ci=ci, deploy="kubernetes")
    name, digest = f"registry.example.com/team/{service.path.name}", "0a" * 32
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "DIGEST": digest}
    if ci == "github":
        name = f"ghcr.io/team/{service.path.name}"
        steps = parsed(service.path, WORKFLOW)["jobs"]["publish"]["steps"]
        [script] = [step["run"] for step in steps if "run" in step]
        script = script.partition("\n# With the vendored runtime")[0] + "\ncat image.txt"
        for program, text in (("docker", DOCKER), ("uv", "#!/bin/sh\n")):
            (tmp_path / program).write_text(text)
            (tmp_path / program).chmod(0o755)
        variables |= {"GITHUB_REPOSITORY_OWNER": "Team", "GITHUB_REF_NAME": "main", "TOKEN": ""}
        variables |= {"GITHUB_RUN_NUMBER": "7", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
        (tmp_path / "pyproject.toml").touch()
    else:
        script = parsed(service.path, GITLAB)["publish"]["script"][-1]
        variables["IMAGE"] = name
        built = json.dumps({"containerimage.digest": f"sha256:{digest}"})
        (tmp_path / "built.json").write_text(built)
    said = run("bash", "-eo", "pipefail", "-c", script, cwd=tmp_path, env=variables).stdout
    production = "deploy/kubernetes/overlays/production/kustomization.yaml"
    [image] = parse_yaml(service.read(production))["images"]
    command = f"kustomize edit set image {image['name']}={name}@sha256:{digest}"
    assert {*said.splitlines()} == {command}


def test_github_attests_how_the_image_was_built_and_what_is_in_it(github: Any) -> None:
    """Two attestations of one subject, the image: `gh attestation verify` finds both by its digest."""
    steps = github["jobs"]["publish"]["steps"]
    [script] = [step["run"] for step in steps if "run" in step]
    assert 'echo "${pushed#*@sha256:}  $name" > subject.txt' in script
    attested = [step["with"] for step in steps if step.get("uses", "").startswith("actions/attest")]
    image = {"subject-checksums": "published/subject.txt"}
    assert attested == [image, {**image, "sbom-path": "published/sbom.json"}]


@pytest.mark.parametrize("deploy", ["kubernetes", "compose"])
def test_gitlab_com_signs_the_digest_that_was_published_and_its_bill_of_materials(
    render: Render, tmp_path: Path, deploy: str
) -> None:
    job = parsed(render(ci="gitlab", deploy=deploy).path, GITLAB)["attest"]
    assert job["id_tokens"] == {"SIGSTORE_ID_TOKEN": {"aud": "sigstore"}}
    pushed = "registry.gitlab.com/team/orders/order-events@sha256:" + "0a" * 32
    before = "kustomize edit set image order-events=" if deploy == "kubernetes" else ""
    (tmp_path / "image.txt").write_text(f"{before}{pushed}\n")
    (tmp_path / "cosign").write_text(
        '#!/bin/sh\necho "$@" >> asked\n[ "$1" != login ] || cat >> asked\n'
    )
    (tmp_path / "cosign").chmod(0o755)
    variables = {f"CI_REGISTRY{name}": f"the{name}" for name in ("", "_USER", "_PASSWORD")}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run("sh", "-ec", "\n".join(job["script"]), cwd=tmp_path, env={**variables, "PATH": path})
    assert (tmp_path / "asked").read_text().splitlines() == [
        "login the --username the_USER --password-stdin",
        "the_PASSWORD",
        f"sign --yes {pushed}",
        f"attest --yes --type cyclonedx --predicate sbom.json {pushed}",
    ]


@pytest.mark.parametrize("ci", CI)
def test_the_image_has_the_same_labels_from_both(render: Render, ci: str) -> None:
    """tests/test_image.py has their values."""
    text = render(ci=ci).read(WORKFLOW if ci == "github" else GITLAB)
    assert re.findall(r'label[: ]"?org\.opencontainers\.image\.(\w+)=', text) == [
        *("created", "licenses", "revision", "source", "version")
    ]


def test_without_an_image_nothing_is_published(render: Render) -> None:
    for deploy in ("systemd", "none"):
        service = render(ci="github", deploy=deploy)
        assert "publish" not in parsed(service.path, WORKFLOW)["jobs"]
        assert "docker" not in service.read(WORKFLOW) + service.read(DEPENDABOT)


def test_the_template_is_tested_on_every_python_and_system_each_week() -> None:
    workflow = parsed(TEMPLATE, WORKFLOW)
    assert workflow["on"]["schedule"]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [
        f"3.{minor}" for minor in range(11, 15)
    ]
    assert workflow["jobs"]["audit"]["strategy"]["matrix"] == {
        "broker": QUESTIONS["broker"],
        "telemetry": ["both"],
    }
    of_both = set(QUESTIONS["_telemetries"]["both"]["dependencies"])
    assert all(
        of_both.issuperset(one["dependencies"]) for one in QUESTIONS["_telemetries"].values()
    )
    systems = workflow["jobs"]["newcomer"]["strategy"]["matrix"]["system"]
    assert {system.split("-")[0] for system in systems} == {"ubuntu", "macos", "windows"}


def test_what_only_root_can_test_is_tested_as_root() -> None:
    steps = parsed(TEMPLATE, WORKFLOW)["jobs"]["test"]["steps"]
    [step] = [step for step in steps if "sudo" in step.get("run", "") and "tasks.py" in step["run"]]
    files = [f"tests/test_{name}.py" for name in ("deploy", "image", "servers", "under_systemd")]
    assert step["run"].split()[-5:] == [*files, "tests/runtime/test_memory.py"]
    assert step["env"] == {"REQUIRE_IMAGE": "1", "REQUIRE_BROKERS": "1"}
    assert f"--preserve-env={','.join(step['env'])}" in step["run"]
    assert steps.index(step) == len(steps) - 1, "what root has written, others may not be able to"


@BROKERS
def test_the_tests_of_a_service_have_their_broker(render: Render, broker: str) -> None:
    row = QUESTIONS["_brokers"][broker]
    github = parsed(render(broker=broker, ci="github").path, WORKFLOW)["jobs"]["test"]
    gitlab = parsed(render(broker=broker, ci="gitlab").path, GITLAB)["test"]
    assert gitlab["parallel"]["matrix"] == [{"PYTHON": ["3.11", "3.14"]}]
    assert github["env"]["REQUIRE_BROKERS"] == gitlab["variables"]["REQUIRE_BROKERS"] == "1"
    installs = [step for step in [*gitlab.get("before_script", [])] if " install " in step]
    assert [step.split()[-1] for step in installs] == row["packages"].split()
    if not row["service"]:
        for job in (github, gitlab):
            assert "services" not in job
            assert "CONSUMER_TEST_BROKER_URL" not in {
                **job.get("env", {}),
                **job.get("variables", {}),
            }
        return
    [of_gitlab] = gitlab["services"]
    of_github = github["services"]["broker"]
    assert of_github["image"] == of_gitlab["name"] == row["image"]
    port = row["service"]["port"]
    assert of_github["ports"] == [f"{port}:{port}"]
    assert of_gitlab["variables"] == {
        "HEALTHCHECK_TCP_PORT": str(port),
        **of_github.get("env", {}),
    }
    assert github["env"]["CONSUMER_TEST_BROKER_URL"] == row["url"]
    at = "127.0.0.1" if broker == "kafka" else of_gitlab["alias"]
    assert gitlab["variables"]["CONSUMER_TEST_BROKER_URL"] == row["url"].replace("127.0.0.1", at)


@pytest.mark.parametrize(
    ("ci", "broker"), [("github", "rabbitmq"), ("gitlab", "rabbitmq"), ("gitlab", "kafka")]
)
def test_a_change_is_checked_by_a_rehearsal(render: Render, ci: str, broker: str) -> None:
    """The command collects its test; on the real broker, since `REQUIRE_BROKERS` is set in each service."""
    service = render(broker=broker, ci=ci)
    if ci == "github":
        job = parsed(service.path, WORKFLOW)["jobs"]["test"]
        lines = [step["run"] for step in job["steps"] if "run" in step]
    else:
        lines = parsed(service.path, GITLAB)["test"]["script"]
    [arguments] = [line.partition(" pytest ")[2] for line in lines if " pytest " in line]
    command = f"{sys.executable} -m pytest {arguments} -n 0 --collect-only -q"
    collected = run("sh", "-c", command, cwd=service.path, env={"PYTHONPATH": "src"}).stdout
    assert "tests/test_rehearsal.py::test_no_handler_loses_or_doubles_its_work" in collected


@BROKERS
def test_ci_compose_and_tests_run_the_same_version_of_the_broker(
    render: Render, broker: str
) -> None:
    if broker == "sqlite":
        assert "image" not in QUESTIONS["_brokers"][broker]
        return
    image = QUESTIONS["_brokers"][broker]["image"]
    assert re.fullmatch(r"[\w/-]+:\d+\.\d+(\.\d+)?(-alpine)?", image)
    compose = render(broker=broker, deploy="compose").read("compose.yaml")
    assert parse_yaml(compose)["services"]["broker"]["image"] == image
    started = re.findall(r'^IMAGE = "(.+)"', servers_file(render, broker), re.M)
    assert started == ([] if broker == "sqs" else [image])  # moto comes from PyPI


def test_kafka_has_the_settings_that_the_tests_give_it(render: Render) -> None:
    tree = ast.parse(servers_file(render, "kafka"))
    [function] = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "_environment"
    ]
    variables = next(node.value for node in function.body if isinstance(node, ast.Assign))
    namespace = {"port": 9092}
    expected = eval(compile(ast.Expression(variables), "servers/kafka.py", "eval"), namespace)
    service = QUESTIONS["_brokers"]["kafka"]["service"]
    assert service["variables"] == {f"KAFKA_{name}": value for name, value in expected.items()}


def servers_file(render: Render, broker: str) -> str:
    return render(broker=broker).read(f"tests/runtime/harness/servers/{broker}.py")


@pytest.mark.parametrize("ci", CI)
def test_the_steps_that_need_no_server_pass(render_own: Render, ci: str) -> None:
    """All except the tests, the image, and the audit, which queries a network service; uv.lock must exist, and fit."""
    service = render_own(ci=ci, broker="sqlite")
    if ci == "github":
        jobs = parsed(service.path, WORKFLOW)["jobs"]
        steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    else:
        jobs = parsed(service.path, GITLAB)
        chosen_jobs = ("lint", "types", "audit", "bill-of-materials")
        steps = [step for job in chosen_jobs for step in jobs[job]["script"]]
    needs_more = re.compile("pip-audit|pytest|docker")
    chosen = [step for step in steps if not needs_more.search(step)]
    assert len(steps) > len(chosen) > 4
    missing = run("sh", "-ec", "\n".join(chosen), cwd=service.path, check=False)
    assert missing.returncode != 0
    assert "To create a lockfile, run `uv lock`" in missing.stdout
    run("uv", "lock", cwd=service.path)
    run("sh", "-ex", "-c", "\n".join(chosen), cwd=service.path)
    assert "--hash=sha256:" in service.read("requirements.txt")
    spoil(service, "pyproject.toml", '"structlog>=25.4,<27"', '"structlog>=25.4,<26"')
    stale = run("sh", "-ec", "\n".join(chosen), cwd=service.path, check=False)
    assert "The lockfile at `uv.lock` needs to be updated" in stale.stdout


def test_bots_edit_the_lock_for_vulnerabilities_and_the_images(render: Render) -> None:
    """The weekly job upgrades the rest of the lock; the template owns versions in pyproject.toml, workflows, compose."""
    for deploy in QUESTIONS["deploy"]:
        update, *images = parsed(render(ci="github", deploy=deploy).path, DEPENDABOT)["updates"]
        assert update["package-ecosystem"] == "uv"
        assert update["versioning-strategy"] == "lockfile-only"
        assert update["open-pull-requests-limit"] == 0
        assert all(one["cooldown"] == {"default-days": 7} for one in (update, *images))
        has_image = deploy in ("kubernetes", "compose")
        assert [one["package-ecosystem"] for one in images] == ["docker"] * has_image
    renovate = parsed(render(ci="gitlab").path, RENOVATE)
    assert renovate["enabledManagers"] == ["pep621", "dockerfile"]
    assert renovate["extends"] == ["security:only-security-updates"]
    assert renovate["rangeStrategy"] == "update-lockfile"
    [images_rule] = renovate["packageRules"]
    assert images_rule["matchManagers"] == ["dockerfile"]
    assert images_rule["enabled"]
    assert images_rule["pinDigests"]
    assert images_rule["minimumReleaseAge"] == "7 days"
    assert "lockFileMaintenance" not in renovate, "it knows no minimumReleaseAge"
