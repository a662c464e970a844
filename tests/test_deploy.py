"""The deployment files of a service are valid for each broker, and work."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import kubernetes_validate
import pytest
from pydantic import SecretStr

from harness.servers.local import free_port
from runtime.brokers import make_source
from runtime.errors import BrokerUnavailable
from runtime.settings import ConsumerSettings
from support.image import BuildFailed, Stage, build, instructions, why_not_here
from support.rendered import (
    QUESTIONS,
    TEMPLATE,
    TREE,
    Prove,
    Render,
    Service,
    cookiecutter,
    environment_of,
    parse_yaml,
    run,
)

BROKERS: list[str] = QUESTIONS["broker"]
TELEMETRIES: list[str] = QUESTIONS["telemetry"]
DEPLOYS: list[str] = QUESTIONS["deploy"]
SCRAPED = ("prometheus", "both")
"""The telemetries with metrics for Prometheus."""
DRAIN_SECONDS, GRACE_SECONDS = QUESTIONS["_drain_seconds"], QUESTIONS["_grace_seconds"]

# The validator would read a megabyte of JSON for each object, twice.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

each_broker = pytest.mark.parametrize("broker", BROKERS)
each_overlay = pytest.mark.parametrize("overlay", ["staging", "production"])


def program(name: str) -> str:
    """The path of a program; skips the test if it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_an_unknown_way_to_deploy_is_refused_by_cookiecutter_itself(tmp_path: Path) -> None:
    result = cookiecutter(tmp_path, "--no-input", "deploy=nomad")
    assert result.returncode == 1
    assert "nomad provided for choice variable deploy" in result.stdout


# -- one number


def test_the_grace_period_is_what_the_runtime_may_take_and_a_margin() -> None:
    runtime = TREE / "src/{{cookiecutter.package_name}}/runtime"
    drain = number(r"drain_seconds: float = Field\(default=(\d+)", runtime / "settings.py")
    close = number(r"^CLOSE_SECONDS = (\d+)", runtime / "watchdog.py")
    margin = number(r"^MARGIN_SECONDS = (\d+)", TREE / "tests/deploy/test_grace.py")
    assert drain == DRAIN_SECONDS
    assert drain + close + margin == GRACE_SECONDS


def number(pattern: str, file: Path) -> int:
    [found] = re.findall(pattern, file.read_text("utf-8"), re.M)
    return int(found)


BASE = "deploy/kubernetes/base"
PRODUCTION = "deploy/kubernetes/overlays/production/kustomization.yaml"
OF_PRODUCTION = """  - patch: |
      apiVersion: apps/v1
      kind: Deployment
      metadata:
        name: order-events
      spec:
        template:
          spec:
            terminationGracePeriodSeconds: {}
"""
JSON_PATCH = """  - target: {{kind: Deployment}}
    patch: |
      - op: replace
        path: /spec/template/spec/terminationGracePeriodSeconds
        value: {}
"""
KUSTOMIZATION = f"{BASE}/kustomization.yaml"
UNIT = "deploy/systemd/order-events.service"
VARIABLE = "CONSUMER_DRAIN_SECONDS"
PORTS = "          ports:"
BEFORE_DRAIN = f"""          env:
            - name: CONSUMER_DRAIN_SECONDS
              value: "26"
{PORTS}"""
AS_IT_CAME = ("", "")


def early(kills_after: float, may_take: float) -> str:
    return f"the supervisor kills after {kills_after:g} seconds, and a stop may take {may_take:g}:"


@pytest.mark.parametrize(
    ("deploy", "file", "old", "new", "complaint"),
    [
        ("kubernetes", KUSTOMIZATION, *AS_IT_CAME, ""),
        ("kubernetes", f"{BASE}/consumer.yaml", "Seconds: 40", "Seconds: 39", early(39, 40)),
        ("kubernetes", f"{BASE}/consumer.yaml", "Seconds: 40", "Seconds: 41", ""),
        ("kubernetes", f"{BASE}/consumer.yaml", PORTS, BEFORE_DRAIN, early(40, 41)),
        ("kubernetes", KUSTOMIZATION, f"{VARIABLE}=25", f"{VARIABLE}=60", early(40, 75)),
        ("kubernetes", KUSTOMIZATION, f"      - {VARIABLE}=25\n", "", ""),  # equals the default
        ("kubernetes", f"{BASE}/consumer.yaml", "termination", "# termination", "no grace period"),
        ("kubernetes", PRODUCTION, "patches:\n", f"patches:\n{OF_PRODUCTION}", early(30, 40)),
        ("kubernetes", PRODUCTION, "patches:\n", f"patches:\n{JSON_PATCH}", early(30, 40)),
        ("compose", "compose.yaml", *AS_IT_CAME, ""),
        ("compose", "compose.yaml", "period: 40s", "period: 39s", early(39, 40)),
        ("compose", "compose.yaml", "period: 40s", "period: 1m", ""),
        ("compose", "compose.yaml", f'{VARIABLE}: "25"', f'{VARIABLE}: "25.5"', early(40, 40.5)),
        ("systemd", UNIT, *AS_IT_CAME, ""),
        ("systemd", UNIT, "TimeoutStopSec=40", "TimeoutStopSec=39s", early(39, 40)),
        ("systemd", UNIT, "TimeoutStopSec=40", "TimeoutStopSec=1min 30s", ""),
        ("systemd", UNIT, f"{VARIABLE}=25", f"{VARIABLE}=30", early(40, 45)),
    ],
)
def test_the_services_own_test_sees_an_edit_that_makes_the_grace_period_too_short(
    render_own: Render, deploy: str, file: str, old: str, new: str, complaint: str
) -> None:
    service = render_own(deploy=deploy)
    edited = service.read(file).replace(old, new.format(30)) if old else service.read(file)
    assert (edited == service.read(file)) == (old == new)
    service.write(file, edited)
    result = service.run(
        *["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/deploy"],
        environment=service.environment(),
    )
    assert result.returncode == (1 if complaint else 0), result.stdout
    assert complaint in result.stdout


# -- the image


@pytest.mark.parametrize("deploy", ["kubernetes", "compose"])
@each_broker
def test_the_dockerfile_passes_a_linter(render: Render, broker: str, deploy: str) -> None:
    service = render(broker=broker, deploy=deploy)
    result = run(program("hadolint"), "Dockerfile", cwd=service.path, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new"), [('["order-events"]', "order-events"), ("10001:10001", "root")]
)
def test_the_linter_of_dockerfiles_sees(render_own: Render, old: str, new: str) -> None:
    service = render_own(deploy="compose")
    service.write("Dockerfile", service.read("Dockerfile").replace(old, new))
    assert run(program("hadolint"), "Dockerfile", cwd=service.path, check=False).returncode == 1


@each_broker
def test_the_last_stage_runs_nothing_and_starts_the_service_without_a_shell(
    render: Render, broker: str
) -> None:
    steps = instructions(render(broker=broker, deploy="compose").read("Dockerfile"))
    starts = [index for index, (name, _) in enumerate(steps) if name == "FROM"]
    last = dict(steps[starts[-1] :])
    assert len(starts) == 3, "uv, the build, and the image"
    assert "RUN" not in last
    assert json.loads(last["ENTRYPOINT"]) == ["order-events"]
    assert json.loads(last["CMD"]) == ["run"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])


@pytest.mark.parametrize("deploy", ["kubernetes", "compose"])
def test_images_have_exact_versions_in_lines_that_update_bots_move(
    render: Render, deploy: str
) -> None:
    """Dependabot reads no image in COPY --from: https://github.com/dependabot/dependabot-core/issues/5103."""
    steps = instructions(render(deploy=deploy).read("Dockerfile"))
    images = [text.partition(" AS ")[0] for name, text in steps if name == "FROM"]
    assert all(
        re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+(-[\w-]+)?(@sha256:\w{64})?", i) for i in images
    )
    [uv, build, last] = images
    assert build == last
    copied = [text for name, text in steps if name == "COPY" and "--from" in text]
    assert {re.findall(r"--from=(\S+)", text)[0] for text in copied} == {"uv", "build"}
    # The same uv and the same Python as in CI.
    version = uv.partition(":")[2]
    minor = re.findall(r"python:(\d+\.\d+)\.", build)[0]
    github = render(deploy=deploy, ci="github").read(".github/workflows/ci.yml")
    assert set(re.findall(r'\{version: "([\d.]+)"', github)) == {version}
    assert f'UV_PYTHON: "{minor}"' in github
    gitlab = render(deploy=deploy, ci="gitlab").read(".gitlab-ci.yml")
    assert f"ghcr.io/astral-sh/uv:{version}-python{minor}-trixie-slim\n" in gitlab
    assert set(re.findall(r"astral-sh/uv:([\d.]+)-", gitlab)) == {version}


class Probed(BaseHTTPRequestHandler):
    """Answers like a service's probes."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/livez" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def probed() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Probed) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def healthy(healthcheck: list[str], port: int) -> bool:
    """The result of the health check for the server on this port."""
    [python, *arguments] = healthcheck
    assert python == "python"
    variables = {"CONSUMER_PROBE_PORT": str(port)}
    check = run(sys.executable, *arguments, cwd=Path.cwd(), check=False, env=variables)
    return check.returncode == 0


def test_the_health_check_asks_livez(
    render: Render, probed: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerfile = render(deploy="compose").read("Dockerfile")
    [text] = [text for name, text in instructions(dockerfile) if name == "HEALTHCHECK"]
    check = json.loads(text.partition("CMD ")[2])
    assert healthy(check, probed.server_port)
    assert healthy(check, 0), "0 disables the probes, and is no reason for a restart"
    monkeypatch.setattr(Probed, "status", 503)
    assert not healthy(check, probed.server_port)
    assert not healthy(check, 1)
    assert healthy(check, 0), "CONSUMER_PROBE_PORT=0 disables the probes, and so their check"


BUILD = pytest.mark.skipif(
    bool(why_not_here()) and os.environ.get("REQUIRE_IMAGE") != "1",  # our workflow runs it as root
    reason=why_not_here() or "it can be built here",
)


@pytest.fixture(scope="module")
def image(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("image")
    service = render(broker="sqlite", deploy="compose").copy_to(folder)
    run("uv", "lock", "--quiet", cwd=service.path)
    return build(service, folder / "stages")


def wait_for_event(process: subprocess.Popen[str], event: str) -> list[dict[str, Any]]:
    """Read the log up to this event."""
    assert process.stdout is not None
    seen: list[dict[str, Any]] = []
    for line in process.stdout:
        assert line.startswith("{"), line + process.stdout.read()
        seen.append(json.loads(line))
        if seen[-1]["event"] == event:
            return seen
    msg = f"no {event} in {seen}"
    raise AssertionError(msg)


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}


@BUILD
def test_the_image_has_the_service_and_no_tools_to_build_with(image: Stage) -> None:
    assert image.path("/app/bin/order-events").exists()
    assert not image.path("/build").exists()
    assert [path.name for path in image.path("/app/bin").iterdir() if "uv" in path.name] == []
    assert list(image.path("/app").rglob("hypothesis")) == []
    assert list(image.path("/app").rglob("runtime/__pycache__/consumer.*.pyc"))
    assert [path for path in image.path("/app").rglob("*") if path.lstat().st_uid != 0] == []


@BUILD
@pytest.mark.parametrize(
    ("url", "writable"),
    [("sqlite:////data/messages.db", ["/data"]), ("sqlite:////tmp/messages.db", [])],
    ids=["a volume", "only /tmp"],
)
def test_as_process_1_without_rights_and_on_a_read_only_root_it_shuts_down_on_sigterm(
    image: Stage, url: str, writable: list[str]
) -> None:
    """The kernel gives process 1 no default actions: a signal without a handler is lost on it."""
    port = free_port()
    process = image.start(writable=writable, CONSUMER_BROKER_URL=url, CONSUMER_PROBE_PORT=str(port))
    try:
        wait_for_event(process, "consuming")
        assert healthy(image.healthcheck, port)
        [pid] = map(
            int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        )
        status = status_of(pid)
        assert status["NSpid"][-1] == "1"
        assert status["Uid"] == status["Gid"] == ["10001"] * 4
        mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
        may_write = {words[1] for words in mounts if words[3].split(",")[0] == "rw"}
        assert may_write - {"/proc"} - {path for path in may_write if path.startswith("/dev")} == {
            "/tmp",
            *writable,
        }
        asked_at = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        too_late = Timer(GRACE_SECONDS - DRAIN_SECONDS, os.kill, (pid, signal.SIGKILL))
        too_late.start()
        wait_for_event(process, "stopped")
        assert process.wait() == 0
        assert time.monotonic() - asked_at < GRACE_SECONDS - DRAIN_SECONDS
        too_late.cancel()
    finally:
        process.kill()
        process.communicate()


@BUILD
def test_elsewhere_it_cannot_write(image: Stage) -> None:
    """Otherwise the test above would prove nothing about a read-only root."""
    process = image.start(
        writable=["/data"],
        CONSUMER_BROKER_URL="sqlite:////app/messages.db",
        CONSUMER_PROBE_PORT="0",
        CONSUMER_CONNECT_SECONDS="0",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "messages.db" in output


@BUILD
def test_process_1_ignores_a_signal_that_it_does_not_handle(image: Stage) -> None:
    """The result of the test above for a service that does not handle SIGTERM."""
    program = "import os, signal; os.kill(1, signal.SIGTERM); print('still here')"
    careless = Stage(image.root, user=image.user, entrypoint=["python3", "-c", program])
    output, _ = careless.start(writable=[]).communicate(timeout=60)
    assert output == "still here\n"


@BUILD
def test_a_lock_that_does_not_fit_the_dependencies_ends_the_build(
    render: Render, tmp_path: Path
) -> None:
    service = render(broker="sqlite", deploy="kubernetes").copy_to(tmp_path)
    run("uv", "lock", "--quiet", cwd=service.path)
    declared = service.read("pyproject.toml")
    service.write(
        "pyproject.toml", declared.replace('"structlog>=25.4', '"anyio",\n"structlog>=25.4')
    )
    with pytest.raises(BuildFailed, match="lockfile"):
        build(service, tmp_path / "stages")


@BUILD
def test_a_package_that_has_not_the_hash_of_the_lock_ends_the_build(
    render: Render, tmp_path: Path
) -> None:
    service = render(broker="sqlite", deploy="compose").copy_to(tmp_path)
    run("uv", "lock", "--quiet", cwd=service.path)
    locked = service.read("uv.lock")
    [structlog] = re.findall(r'(?s)\[\[package\]\]\nname = "structlog"\n.*?\n\n', locked)
    spoiled = re.sub("sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", structlog)
    assert spoiled != structlog
    service.write("uv.lock", locked.replace(structlog, spoiled))
    with pytest.raises(BuildFailed, match="Hash mismatch for `structlog"):
        build(service, tmp_path / "stages")


@BUILD
def test_without_a_lock_the_build_ends_with_one_sentence(render: Render, tmp_path: Path) -> None:
    service = render(broker="redis", deploy="kubernetes").copy_to(tmp_path)
    with pytest.raises(BuildFailed) as failed:
        build(service, tmp_path / "failed")
    assert str(failed.value) == "uv.lock is missing: run 'uv lock', and commit the file.\n"
    run("uv", "lock", "--quiet", cwd=service.path)
    image = build(service, tmp_path / "stages")
    assert image.path("/app/bin/order-events").exists()
    assert not image.path("/data").exists()


# -- Compose


@each_broker
def test_compose_is_valid_and_its_broker_is_healthy_before_the_service_starts(
    render: Render, broker: str
) -> None:
    service = render(broker=broker, deploy="compose")
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    run(*check, cwd=service.path)
    services = parse_yaml(service.read("compose.yaml"))["services"]
    consumer = services["consumer"]
    assert consumer["read_only"] is True
    assert consumer["cap_drop"] == ["ALL"]
    assert consumer["security_opt"] == ["no-new-privileges:true"]
    assert "init" not in consumer
    url = consumer["environment"]["CONSUMER_BROKER_URL"]
    if broker == "sqlite":
        assert services.keys() == {"consumer"}
        assert consumer["volumes"] == [f"data:{Path(url.removeprefix('sqlite:///')).parent}"]
        return
    assert consumer["depends_on"] == {"broker": {"condition": "service_healthy"}}
    assert re.fullmatch(r"[\w/-]+:\d+\.\d+(\.\d+)?(-alpine)?", services["broker"]["image"])
    assert services["broker"]["healthcheck"]["test"][0] == "CMD"
    [port] = services["broker"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert "@broker:" in url or "//broker:" in url
    if broker != "sqs":  # the example of SQS is Amazon's own
        [example] = re.findall(r"^CONSUMER_BROKER_URL=\S+", service.read(".env.example"), re.M)
        assert f":{port.split(':')[1]}" in example


@pytest.mark.parametrize("telemetry", TELEMETRIES)
@each_broker
def test_compose_bounds_memory_and_logs_and_publishes_the_metrics_on_loopback_only(
    render: Render, broker: str, telemetry: str
) -> None:
    service = render(broker=broker, deploy="compose", telemetry=telemetry)
    services = parse_yaml(service.read("compose.yaml"))["services"]
    for one in services.values():
        assert one["logging"]["driver"] == "json-file"
        assert one["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
    assert services["consumer"]["mem_limit"] == "256m"
    assert services["consumer"]["pids_limit"] == 1024
    port = QUESTIONS["_probe_port"]
    published = [f"127.0.0.1:{port}:{port}"] if telemetry in SCRAPED else None
    assert services["consumer"].get("ports") == published


def test_the_schema_of_compose_sees(render_own: Render) -> None:
    service = render_own(deploy="compose")
    service.write("compose.yaml", service.read("compose.yaml").replace("cap_drop", "cap_dropp"))
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    assert run(*check, cwd=service.path, check=False).returncode == 1


# -- Kubernetes

NAMED = {"name": "order-events"}
OF_SECRET: dict[str, dict[str, Any]] = {"authenticationRef": NAMED}
TRIGGERS = json.loads((TEMPLATE / "tests/support/keda_triggers.json").read_text("utf-8"))
KEDA = {
    "rabbitmq": OF_SECRET
    | {
        "type": "rabbitmq",
        "metadata": {
            "protocol": "amqp",
            "queueName": "order-events",
            "mode": "QueueLength",
            "value": "500",
        },
    },
    "nats": {
        "type": "nats-jetstream",
        "metadata": {
            "natsServerMonitoringEndpoint": "nats.nats.svc:8222",
            "account": "$G",
            "stream": "order-events",
            "consumer": "order-events",
            "lagThreshold": "500",
        },
    },
    "redis": OF_SECRET
    | {
        "type": "redis-streams",
        "metadata": {
            "address": "redis.redis.svc:6379",
            "stream": "order-events",
            "consumerGroup": "order-events",
            "lagCount": "500",
        },
    },
    "kafka": OF_SECRET
    | {
        "type": "kafka",
        "metadata": {
            "bootstrapServers": "kafka.kafka.svc:9092",
            "consumerGroup": "order-events",
            "topic": "order-events",
            "offsetResetPolicy": "earliest",
            "lagThreshold": "500",
        },
    },
    "sqs": OF_SECRET
    | {
        "type": "aws-sqs-queue",
        "metadata": {
            "queueURL": "order-events",
            "awsRegion": "eu-central-1",
            "queueLength": "500",
        },
    },
    "postgres": OF_SECRET
    | {
        "type": "postgresql",
        "metadata": {
            "query": "SELECT count(*) FROM consumer.messages"
            " WHERE source = 'order-events' AND due_at <= now()",
            "targetQueryValue": "500",
        },
    },
}
"""The trigger of each broker.

KEDA has none for MQTT; and more pods on a file on one node have no more throughput.
"""
TLS = {name: name for name in ("tls", "ca", "cert", "key")}
LOGIN = {"username": "username", "password": "password"}
AUTHENTICATION: dict[str, dict[str, str]] = {
    "rabbitmq": {"host": "broker-url", **TLS},
    "redis": {**LOGIN, **TLS},
    "kafka": {"sasl": "sasl", **LOGIN, **TLS},
    "postgres": {"connection": "broker-url"},  # the URL has the options of TLS
}
"""The parameters of the trigger, by the key of the Secret. SQS has roles, and NATS's monitoring port has no login."""
PARTITIONS = 12
"""The partitions of a topic that the service creates; one more pod would have no partition."""
CUSTOM = {"keda.sh": "keda", "monitoring.coreos.com": "prometheus_operator"}
Manifests = dict[str, dict[str, Any]]


def built(service: Service, overlay: str) -> str:
    folder = f"deploy/kubernetes/overlays/{overlay}"
    return run(program("kubectl"), "kustomize", folder, cwd=service.path).stdout


def kustomized(service: Service, overlay: str) -> Manifests:
    """The manifests to apply, by kind."""
    documents = [parse_yaml(text) for text in built(service, overlay).split("\n---\n")]
    manifests = {document["kind"]: document for document in documents}
    assert len(manifests) == len(documents)
    return manifests


def workload(manifests: Manifests) -> dict[str, Any]:
    [found] = [manifests[kind] for kind in ("Deployment", "StatefulSet") if kind in manifests]
    return found


@pytest.mark.parametrize("telemetry", TELEMETRIES)
@each_overlay
@each_broker
def test_what_kustomize_makes_is_valid(
    render: Render, prove: Prove, broker: str, overlay: str, telemetry: str
) -> None:
    service = render(broker=broker, deploy="kubernetes", telemetry=telemetry)
    manifests = kustomized(service, overlay)
    for kind, manifest in manifests.items():
        assert manifest["metadata"]["namespace"] == overlay
        assert unknown_fields(manifest) == ""
        prove("Kubernetes objects that are valid", kind)


def unknown_fields(manifest: dict[str, Any]) -> str:
    """The unknown fields; empty if the object is valid. Raises ValidationError if it has a wrong value."""
    group = manifest["apiVersion"].partition("/")[0]
    if group not in CUSTOM:
        for version in ("1.30", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(manifest, version, strict=True)
        return ""
    module, version = CUSTOM[group], manifest["apiVersion"].partition("/")[2]
    models = importlib.import_module(f"cloudcoil.models.{module}.{version}")
    model = getattr(models, manifest["kind"]).model_validate(manifest)
    read = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))  # the known fields
    fallback = manifest["spec"].get("fallback", {})
    if fallback and "behavior" not in models.Fallback.model_fields:  # KEDA before 2.17
        fallback = {name: value for name, value in fallback.items() if name != "behavior"}
        manifest = {**manifest, "spec": {**manifest["spec"], "fallback": fallback}}
    return "" if read == manifest else f"{read} is not {manifest}"


def test_the_schemas_of_kubernetes_see(render: Render) -> None:
    manifest = workload(kustomized(render(deploy="kubernetes"), "staging"))
    manifest["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 40
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("broker", "kind", "field"),
    [
        ("rabbitmq", "ScaledObject", "fallbacks"),
        ("redis", "TriggerAuthentication", "secretTargetRefs"),
        ("mqtt", "PodMonitor", "podMetricsEndpoint"),
    ],
)
def test_the_schemas_of_custom_resources_see(
    render: Render, broker: str, kind: str, field: str
) -> None:
    manifest = kustomized(render(broker=broker, deploy="kubernetes"), "staging")[kind]
    manifest["spec"][field] = manifest["spec"].pop(field[:-1], [])
    try:
        faults = unknown_fields(manifest)
    except ValueError as error:
        faults = str(error)
    assert field in faults


OF_TELEMETRY = {
    "prometheus": set[int](),
    "opentelemetry": {4318},
    "both": {4318},
    "none": set[int](),
}
"""The allowed ports, in addition to those of the broker and of DNS."""


def in_namespace(name: str) -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}


def cidr(addresses: str) -> dict[str, Any]:
    return {"ipBlock": {"cidr": addresses}}


@pytest.mark.parametrize("telemetry", TELEMETRIES)
@each_broker
def test_its_parts_refer_to_each_other(render: Render, broker: str, telemetry: str) -> None:
    service = render(broker=broker, deploy="kubernetes", telemetry=telemetry)
    manifests = kustomized(service, "production")
    spec = workload(manifests)["spec"]
    labels = spec["template"]["metadata"]["labels"]
    selectors = [
        spec["selector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)

    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert pod["serviceAccountName"] == manifests["ServiceAccount"]["metadata"]["name"]
    config = manifests["ConfigMap"]
    assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    assert config["data"]["CONSUMER_DRAIN_SECONDS"] == str(DRAIN_SECONDS)
    assert pod["terminationGracePeriodSeconds"] == GRACE_SECONDS
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }

    port = int(config["data"]["CONSUMER_PROBE_PORT"])
    assert container["ports"] == [{"name": "probes", "containerPort": port}]
    asked = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in asked.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "probes"}
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    prometheus = {"namespaceSelector": in_namespace("monitoring")}
    scraped = {"from": [prometheus], "ports": [{"protocol": "TCP", "port": port}]}
    assert policy.get("ingress", []) == ([scraped] if telemetry in SCRAPED else [])
    [dns, *out] = policy["egress"]
    assert {(one["protocol"], one["port"]) for one in dns["ports"]} == {("UDP", 53), ("TCP", 53)}
    assert dns["to"] == [
        {"namespaceSelector": in_namespace("kube-system")},
        cidr("169.254.20.10/32"),
    ]
    ports = [rule_port["port"] for rule in out for rule_port in rule["ports"]]
    of_broker = {*QUESTIONS["_brokers"][broker]["ports"], *([80] if broker == "sqs" else [])}
    assert set(ports) == of_broker | OF_TELEMETRY[telemetry]
    if broker == "sqs":  # the agent of EKS Pod Identity, on both of its addresses
        assert out[1]["to"] == [cidr("169.254.170.23/32"), cidr("fd00:ec2::23/128")]


@each_broker
def test_its_url_is_a_secret_in_a_file_and_its_resources_are_bounded(
    render: Render, broker: str
) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    pod = workload(manifests)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert "env" not in container
    settings = manifests["ConfigMap"]["data"]
    if broker == "sqlite":  # SQLite has no password
        assert settings["CONSUMER_BROKER_URL"] == "sqlite:////data/messages.db"
    else:
        folder, _, key = settings["CONSUMER_BROKER_URL_FILE"].rpartition("/")
        assert key == "broker-url"
        assert {"name": "broker", "mountPath": folder, "readOnly": True} in container[
            "volumeMounts"
        ]
        assert {"name": "broker", "secret": {"secretName": "order-events"}} in pod["volumes"]
        assert "Secret" not in manifests, "it would be in the repository"
    assert container["resources"] == {
        "requests": {"cpu": "100m", "memory": "128Mi", "ephemeral-storage": "64Mi"},
        "limits": {"memory": "256Mi", "ephemeral-storage": "256Mi"},
    }


@each_overlay
@each_broker
def test_no_image_is_started_before_a_release_names_its_digest(
    render_own: Render, broker: str, overlay: str
) -> None:
    service = render_own(broker=broker, deploy="kubernetes")
    [container] = workload(kustomized(service, overlay))["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example.com/order-events@sha256:{'0' * 64}"
    assert container["imagePullPolicy"] == "Always"
    file = f"deploy/kubernetes/overlays/{overlay}/kustomization.yaml"
    service.write(file, service.read(file).replace("0" * 64, "5" * 64))
    [container] = workload(kustomized(service, overlay))["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example.com/order-events@sha256:{'5' * 64}"


@each_broker
def test_it_waits_for_its_broker_as_long_as_a_setting_can_say(render: Render, broker: str) -> None:
    """With a backoff of at most ten seconds; a restarted container would wait up to five minutes."""
    service = render(broker=broker, deploy="kubernetes")
    settings = service.read("src/order_events/runtime/settings.py")
    [most] = re.findall(r"connect_seconds: float = Field\(default=\d+, ge=0, le=([\d_]+)", settings)
    config = kustomized(service, "production")["ConfigMap"]["data"]
    assert config["CONSUMER_CONNECT_SECONDS"] == most.replace("_", "")


@each_broker
def test_a_start_may_block_for_five_minutes_and_a_crash_says_why(
    render: Render, broker: str
) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    spec = workload(manifests)["spec"]
    [container] = spec["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 300
    times = [container["livenessProbe"][name] for name in ("periodSeconds", "timeoutSeconds")]
    assert times == [10, 3], "tests/runtime/test_probes.py floods the port with this timeout"
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert spec["revisionHistoryLimit"] == 3
    assert spec["minReadySeconds"] == 5


@each_broker
def test_in_an_outage_of_the_broker_a_node_can_be_drained(render: Render, broker: str) -> None:
    """Then no pod is ready, and by default Kubernetes would refuse every eviction."""
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    budget = manifests["PodDisruptionBudget"]["spec"]
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@each_broker
def test_its_pods_are_spread_over_nodes_and_zones(render: Render, broker: str) -> None:
    spec = workload(kustomized(render(broker=broker, deploy="kubernetes"), "production"))["spec"]
    spread = spec["template"]["spec"].get("topologySpreadConstraints", [])
    assert [one["topologyKey"] for one in spread] == (
        ["kubernetes.io/hostname", "topology.kubernetes.io/zone"] if broker != "sqlite" else []
    )
    for one in spread:
        assert one["whenUnsatisfiable"] == "ScheduleAnyway"
        assert one["labelSelector"] == spec["selector"]


@each_broker
def test_what_depends_on_the_cluster_is_a_patch_that_the_documents_have(
    render_own: Render, broker: str
) -> None:
    page = (TEMPLATE / "docs/production.md").read_text(encoding="utf-8")
    [patch] = re.findall(r"(?s)```yaml\n(.*?)```", page)
    service = render_own(broker=broker, deploy="kubernetes")
    overlay = service.read(PRODUCTION)
    overlay += "" if "\npatches:\n" in overlay else "patches:\n"
    kind = workload(kustomized(service, "production"))["kind"]
    patch = patch.replace("{kind: Deployment}", f"{{kind: {kind}}}")
    service.write(PRODUCTION, overlay.replace("\npatches:\n", f"\npatches:\n{patch}"))
    manifest = workload(kustomized(service, "production"))
    assert unknown_fields(manifest) == ""
    pod = manifest["spec"]["template"]["spec"]
    assert (pod["hostUsers"], pod["priorityClassName"]) == (False, "consumers")


@each_broker
def test_a_label_of_the_team_reaches_every_object_and_the_pods(
    render_own: Render, broker: str
) -> None:
    service = render_own(broker=broker, deploy="kubernetes", telemetry="none")
    text = service.read(KUSTOMIZATION)
    service.write(
        KUSTOMIZATION, text.replace("component: consumer,", "component: consumer, team: orders,")
    )
    manifests = kustomized(service, "production")
    pod = workload(manifests)["spec"]["template"]["metadata"]["labels"]
    for labels in [pod, *(manifest["metadata"]["labels"] for manifest in manifests.values())]:
        assert labels == {
            "team": "orders",
            "app.kubernetes.io/name": "order-events",
            "app.kubernetes.io/instance": "production",
            "app.kubernetes.io/component": "consumer",
            "app.kubernetes.io/part-of": "order-events",
            "app.kubernetes.io/managed-by": "kustomize",
        }


def selectors_of(manifests: Manifests) -> list[dict[str, str]]:
    """Every selector of pods that a manifest has."""
    spec = workload(manifests)["spec"]
    found = [manifests["PodDisruptionBudget"]["spec"]["selector"], spec["selector"]]
    found += [manifests["NetworkPolicy"]["spec"]["podSelector"]]
    found += [manifests["PodMonitor"]["spec"]["selector"]] if "PodMonitor" in manifests else []
    spread = spec["template"]["spec"].get("topologySpreadConstraints", [])
    return [one["matchLabels"] for one in [*found, *(one["labelSelector"] for one in spread)]]


@each_broker
def test_two_instances_in_one_namespace_have_nothing_in_common(
    render_own: Render, broker: str
) -> None:
    service = render_own(broker=broker, deploy="kubernetes")
    (service.path / "deploy/kubernetes/overlays/production-eu").mkdir()
    second = service.read(PRODUCTION).replace("instance: production", "instance: production-eu")
    affixes = "namePrefix: acme-\nnameSuffix: -eu\nnamespace:"
    service.write(
        PRODUCTION.replace("production", "production-eu"), second.replace("namespace:", affixes)
    )
    ours, other = kustomized(service, "production"), kustomized(service, "production-eu")
    for mine, theirs in ((ours, other), (other, ours)):
        pod = workload(theirs)["spec"]["template"]["metadata"]["labels"]
        for selector in selectors_of(mine):
            assert not selector.items() <= pod.items()
            assert (
                selector.items() <= workload(mine)["spec"]["template"]["metadata"]["labels"].items()
            )
    assert {
        manifest["metadata"]["name"] for kind, manifest in other.items() if kind != "ConfigMap"
    } == {"acme-order-events-eu"}
    if broker in KEDA:
        scaled = other["ScaledObject"]["spec"]
        assert scaled["scaleTargetRef"]["name"] == workload(other)["metadata"]["name"]
        for trigger in scaled["triggers"]:
            name = trigger.get("authenticationRef", {"name": "acme-order-events-eu"})["name"]
            assert name == "acme-order-events-eu"


def test_a_secret_that_an_overlay_generates_is_the_one_that_keda_reads(render_own: Render) -> None:
    service = render_own(broker="redis", deploy="kubernetes")
    generated = "secretGenerator:\n  - name: order-events\n    literals: [broker-url=redis://h]\n"
    service.write(PRODUCTION, service.read(PRODUCTION) + generated)
    manifests = kustomized(service, "production")
    name = manifests["Secret"]["metadata"]["name"]
    assert name != "order-events"
    references = manifests["TriggerAuthentication"]["spec"]["secretTargetRef"]
    assert {one["name"] for one in references} == {name}
    volumes = workload(manifests)["spec"]["template"]["spec"]["volumes"]
    assert {"name": "broker", "secret": {"secretName": name}} in volumes


@each_broker
def test_what_differs_between_environments_is_not_in_the_base(render: Render, broker: str) -> None:
    service = render(broker=broker, deploy="kubernetes", telemetry="opentelemetry")
    for file in (service.path / BASE).iterdir():
        text = re.sub(r"(?m)(^|\s)#.*", "", file.read_text("utf-8"))
        assert not re.search(r"\.svc\b|\d{12}|arn:|eu-central-1|registry\.|namespace: ", text), file


# -- where metrics and traces are sent


@each_overlay
@each_broker
def test_prometheus_scrapes_the_pods(render: Render, broker: str, overlay: str) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), overlay)
    monitor = manifests["PodMonitor"]["spec"]
    pod = workload(manifests)["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert endpoint["path"] == "/metrics"
    series = {re.sub(r"\W", "_", label) for label in monitor["podTargetLabels"]}
    rules = json.dumps(manifests["PrometheusRule"]["spec"])
    assert series == set(re.findall(r"app_kubernetes_io_\w+", rules))
    [name] = set(re.findall(r"app_kubernetes_io_name=[^,}\s]+", rules.replace('\\"', "")))
    assert name == f"app_kubernetes_io_name={pod['metadata']['labels']['app.kubernetes.io/name']}"


@each_broker
def test_a_prometheus_without_the_operator_finds_the_pods_by_annotations(
    render_own: Render, broker: str
) -> None:
    service = render_own(broker=broker, deploy="kubernetes")
    text = service.read(PRODUCTION)
    rules = "../../components/pod-monitor, ../../../prometheus"
    service.write(PRODUCTION, text.replace(rules, "../../components/scrape-annotations"))
    manifests = kustomized(service, "production")
    assert not {"PodMonitor", "PrometheusRule"}.intersection(manifests)
    assert workload(manifests)["spec"]["template"]["metadata"]["annotations"] == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": manifests["ConfigMap"]["data"]["CONSUMER_PROBE_PORT"],
        "prometheus.io/path": "/metrics",
    }


@each_overlay
@pytest.mark.parametrize(
    ("broker", "telemetry"),
    list(zip(BROKERS, itertools.cycle(["opentelemetry", "both"]), strict=False)),
)
def test_the_collector_is_named_and_knows_the_pod(
    render: Render, broker: str, telemetry: str, overlay: str
) -> None:
    service = render(broker=broker, deploy="kubernetes", telemetry=telemetry)
    manifests = kustomized(service, overlay)
    assert ("PodMonitor" in manifests) == (telemetry in SCRAPED)
    [container] = workload(manifests)["spec"]["template"]["spec"]["containers"]
    endpoint = manifests["ConfigMap"]["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert endpoint == "http://otel-collector.monitoring.svc:4318"
    variables = {variable["name"]: variable for variable in container["env"]}
    value = variables["OTEL_RESOURCE_ATTRIBUTES"]["value"]
    attributes = dict(one.split("=") for one in value.split(","))
    fields = {}
    for name, reference in attributes.items():
        variable = variables.get(reference.strip("$()"), {"value": reference})
        fields[name] = variable.get("value") or variable["valueFrom"]["fieldRef"]["fieldPath"]
        assert [*variables].index("OTEL_RESOURCE_ATTRIBUTES") == len(variables) - 1
    assert fields == {
        "deployment.environment.name": "metadata.labels['app.kubernetes.io/instance']",
        "k8s.namespace.name": "metadata.namespace",
        "k8s.pod.name": "metadata.name",
        "k8s.pod.uid": "metadata.uid",
        "k8s.node.name": "spec.nodeName",
        "k8s.container.name": container["name"],
    }


@pytest.mark.parametrize("telemetry", TELEMETRIES)
def test_a_collector_on_the_same_machine_is_named_in_compose_and_in_the_unit(
    render: Render, telemetry: str
) -> None:
    compose = render(deploy="compose", telemetry=telemetry).read("compose.yaml")
    consumer = parse_yaml(compose)["services"]["consumer"]
    unit = render(deploy="systemd", telemetry=telemetry).read(UNIT)
    of_unit = re.findall(rf"^Environment={ENDPOINT}=(.*)", unit, re.M)
    if not OF_TELEMETRY[telemetry]:
        assert ENDPOINT not in compose + unit
        assert "extra_hosts" not in consumer
        return
    host, _, gateway = consumer["extra_hosts"][0].partition(":")
    assert gateway == "host-gateway"
    [port] = OF_TELEMETRY[telemetry]
    assert consumer["environment"][ENDPOINT] == f"http://{host}:{port}"
    assert of_unit == [f"http://127.0.0.1:{port}"]
    assert unit.index(ENDPOINT) > unit.index("\nEnvironmentFile="), "the file overrides it"


ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


# -- the ports of the network policy


POLICY = f"{BASE}/network-policy.yaml"
REDIS = {"broker": "redis"}


@pytest.mark.parametrize(
    ("answers", "url", "file", "old", "new", "denied"),
    [
        ({}, None, POLICY, *AS_IT_CAME, ""),
        ({}, "amqps://u:p@h/", POLICY, *AS_IT_CAME, ""),
        ({}, "amqps://u:8@h:15671/", POLICY, *AS_IT_CAME, "15671"),
        ({}, "amqps://u:p@h:15671/", POLICY, "port: 5671", "port: 15671", ""),
        ({}, None, POLICY, "port: 5672", "port: 5673", "5672"),
        ({"broker": "kafka"}, "kafkas://a:9096,b:9099", POLICY, *AS_IT_CAME, "9099"),
        ({"broker": "redis"}, None, PRODUCTION, "svc:6379", "svc:6399", "6399"),
        ({"broker": "nats"}, None, PRODUCTION, *AS_IT_CAME, ""),
        ({"broker": "sqs"}, "sqs://eu-central-1", PRODUCTION, *AS_IT_CAME, ""),
        ({"telemetry": "opentelemetry"}, None, PRODUCTION, "svc:4318", "svc:4319", "4319"),
        ({"broker": "mqtt"}, "mqtts://h", POLICY, *AS_IT_CAME, ""),
        # otherwise the default port of the scheme
        ({}, "amqps://u:p@h/", POLICY, "port: 5671", "port: 15671", "5671"),
        ({}, "amqps://u:p@[::1]/%2F?heartbeat=5", POLICY, "port: 5671", "port: 15671", "5671"),
        ({"broker": "mqtt"}, "mqtts://h", POLICY, "port: 8883", "port: 8884", "8883"),
        ({"broker": "kafka"}, "kafka://a,b:9099", POLICY, "port: 9092", "port: 9099", "9092"),
        (REDIS, "redis+sentinel://h/m", POLICY, "port: 26379", "port: 26380", "26379"),
        (REDIS, "redis+cluster://h,i:6380", POLICY, "port: 26379", "port: 26380", ""),
        (REDIS, "unix:///run/redis.sock?db=0", PRODUCTION, *AS_IT_CAME, ""),
        ({"broker": "sqs"}, "sqs://eu-central-1", POLICY, "port: 443", "port: 444", "443"),
        (
            {"telemetry": "both"},
            None,
            PRODUCTION,
            "http://otel-collector.monitoring.svc:4318",
            "https://otlp.example.com/v1",
            "443",
        ),
    ],
)
def test_the_services_own_test_sees_a_port_that_the_policy_denies(
    render_own: Render,
    answers: dict[str, str],
    url: str | None,
    file: str,
    old: str,
    new: str,
    denied: str,
) -> None:
    service = render_own(**answers)
    edited = service.read(file).replace(old, new) if old else service.read(file)
    assert (edited == service.read(file)) == (old == new)
    service.write(file, edited)
    result = service.run(
        *["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/deploy/test_ports.py"],
        environment=service.environment(),
        **({"CONSUMER_BROKER_URL": url} if url else {}),
    )
    assert result.returncode == (1 if denied else 0), result.stdout
    assert (f"no egress to {denied}:" in result.stdout) == bool(denied)


DEFAULT_PORTS = {
    scheme: int(port)
    for row in QUESTIONS["_brokers"].values()
    for scheme, port in row["default_ports"].items()
    if scheme != "sqs"  # botocore knows the endpoint of SQS: HTTPS
}


@pytest.mark.parametrize("scheme", DEFAULT_PORTS)
async def test_the_default_port_is_the_one_that_the_client_connects_to(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = set()

    def refuse(_: socket.socket, address: tuple[str, int]) -> None:
        ports.add(address[1])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    prefix = "redis+" if scheme in ("sentinel", "cluster") else ""
    path = "/master" if scheme == "sentinel" else ""
    url = SecretStr(f"{prefix}{scheme}://127.0.0.1{path}")
    source = make_source(ConsumerSettings(broker_url=url, source="orders"))
    with pytest.raises(BrokerUnavailable):
        await source.__aenter__()
    assert ports == {DEFAULT_PORTS[scheme]}


@each_broker
def test_the_policy_allows_the_default_ports(broker: str) -> None:
    row = QUESTIONS["_brokers"][broker]
    assert {int(port) for port in row["default_ports"].values()} <= {*row["ports"]}


@each_broker
def test_the_services_own_test_passes_for_each_broker(render: Render, broker: str) -> None:
    """Here without the service's environment: it needs the standard library only."""
    service = render(broker=broker, deploy="kubernetes")
    run(
        *[sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"],
        *["-c", os.devnull, "--rootdir", ".", "tests/deploy/test_ports.py"],
        cwd=service.path,
    )


@each_broker
def test_its_pods_have_no_rights(render: Render, broker: str) -> None:
    """The pods satisfy Kubernetes' restricted Pod Security Standard, and their root file system is read-only."""
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    pod = workload(manifests)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}} in pod["volumes"]


@each_broker
def test_how_its_pods_are_replaced_suits_the_broker(render: Render, broker: str) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    assert manifests["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    found = workload(manifests)
    if broker == "mqtt":  # the pod's name owns a session and its messages
        assert found["kind"] == "StatefulSet"
        assert found["spec"]["replicas"] == 2
        assert found["spec"]["podManagementPolicy"] == "Parallel"
    elif broker == "sqlite":
        assert found["spec"]["strategy"] == {"type": "Recreate"}
        assert found["spec"]["replicas"] == 1
        claim = {"claimName": manifests["PersistentVolumeClaim"]["metadata"]["name"]}
        assert manifests["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteOncePod"]
        assert found["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == 10001
        assert {"name": "data", "persistentVolumeClaim": claim} in found["spec"]["template"][
            "spec"
        ]["volumes"]
    else:
        assert found["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        }
        assert "replicas" not in found["spec"], "each apply would undo what KEDA has done"


@each_broker
def test_keda_looks_at_the_broker(render: Render, broker: str) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    if broker not in KEDA:
        assert not [kind for kind in manifests if "Scale" in kind or "Trigger" in kind]
        return
    scaled = manifests["ScaledObject"]
    target = workload(manifests)
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"]["scaleTargetRef"] == {"name": target["metadata"]["name"]}
    most = PARTITIONS if broker == "kafka" else 20
    assert 1 <= scaled["spec"]["minReplicaCount"] < scaled["spec"]["maxReplicaCount"] == most
    assert scaled["spec"]["fallback"] == {
        "failureThreshold": 4,
        "replicas": scaled["spec"]["minReplicaCount"],
        "behavior": "currentReplicasIfHigher",
    }
    [trigger] = scaled["spec"]["triggers"]
    assert trigger == KEDA[broker]
    assert ("authenticationRef" in trigger) == ("TriggerAuthentication" in manifests)
    authentication = manifests.get("TriggerAuthentication", {"spec": {}})["spec"]
    references = authentication.get("secretTargetRef", [])
    assert {one["parameter"]: one["key"] for one in references} == AUTHENTICATION.get(broker, {})
    assert {one["name"] for one in references} <= {"order-events"}
    assert authentication.get("podIdentity") == ({"provider": "aws"} if broker == "sqs" else None)


@each_overlay
@pytest.mark.parametrize("broker", KEDA)
def test_keda_knows_each_parameter_where_it_stands_and_misses_none(
    render: Render, broker: str, overlay: str
) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), overlay)
    [trigger] = manifests["ScaledObject"]["spec"]["triggers"]
    known = TRIGGERS[trigger["type"]]
    authentication = manifests.get("TriggerAuthentication", {"spec": {}})["spec"]
    secrets = [one["parameter"] for one in authentication.get("secretTargetRef", [])]
    for where, names in (("metadata", trigger["metadata"]), ("authentication", secrets)):
        assert [name for name in names if where not in known.get(name, "").split()] == []
    required = {name for name, about in known.items() if "required" in about.split()}
    assert required <= {*trigger["metadata"], *secrets}


OF_A_SOURCE = {
    "rabbitmq": "queueName",
    "nats": "stream",
    "redis": "stream",
    "kafka": "topic",
    "sqs": "queueURL",
    "postgres": "query",
}
"""The parameter of the trigger that names the source."""


@each_overlay
@pytest.mark.parametrize("broker", KEDA)
def test_the_patch_of_the_documents_gives_each_source_a_trigger(
    render_own: Render, broker: str, overlay: str
) -> None:
    page = (TEMPLATE / "docs/scaling.md").read_text(encoding="utf-8")
    [patch] = re.findall(r"(?s)### Several sources\n.*?```yaml\n(.*?)```", page)
    assert f"`{OF_A_SOURCE[broker]}`" in page.partition("### Several sources")[2]
    trigger: dict[str, Any] = KEDA[broker]
    expected: dict[str, Any] = {}
    for source in ("orders", "payments"):
        parameter, metadata = OF_A_SOURCE[broker], dict(trigger["metadata"])
        metadata[parameter] = metadata[parameter].replace("order-events", source)
        expected[source] = {**trigger, "name": source, "metadata": metadata}
        theirs = f"{parameter}, value: {json.dumps(metadata[parameter])}"
        patch = patch.replace(f"queueName, value: {source}", theirs)
    service = render_own(broker=broker, deploy="kubernetes")
    file = f"deploy/kubernetes/overlays/{overlay}/kustomization.yaml"
    service.write(file, service.read(file) + patch)
    scaled = kustomized(service, overlay)["ScaledObject"]
    assert unknown_fields(scaled) == ""
    assert {one["name"]: one for one in scaled["spec"]["triggers"]} == expected
    assert TRIGGERS["kafka"]["topic"] == "metadata", "not required: the page removes it"
    modifiers = scaled["spec"]["advanced"]["scalingModifiers"]
    assert modifiers["formula"] == " + ".join(expected)
    assert modifiers["target"] in trigger["metadata"].values()


def test_a_trigger_with_a_login_gets_it_from_the_secret_with_tls_and_a_client_certificate() -> None:
    """The trigger of NATS has none, and that of SQS uses a role: the test fails when KEDA adds logins for them."""
    login = {"username", "password", "sasl", "connection", *TLS}
    for broker, trigger in KEDA.items():
        known = TRIGGERS[trigger["type"]]
        possible = {name for name in known if name in login and "authentication" in known[name]}
        if broker == "postgres":  # the URL with all parts, in place of single parts
            possible = {"connection"}
        elif broker == "rabbitmq":  # the URL has them
            possible = {"host", *possible} - {"username", "password"}
        assert possible == {*AUTHENTICATION.get(broker, {})}, broker


# -- the review


ACCEPTED = {"CKV_K8S_11"}
"""Findings of checkov: a limit of the CPU would slow the drain down, too."""
CHECKOV = ["--skip-download", "--quiet", "--compact", "-o", "json", "--framework"]
FILES = ("dockerfile", "github_actions", "gitlab_ci", "secrets")
"""The parts of a whole service that checkov reads, in addition to the manifests from kustomize."""


def found_by(reviewers: Path, folder: Path, *frameworks: str) -> tuple[set[str], int]:
    """The checks that failed on any of the files, and how many succeeded."""
    checkov = [str(reviewers / "checkov"), *CHECKOV, *frameworks, "-d", str(folder)]
    result = run(*checkov, cwd=folder, check=False)
    read = json.loads(result.stdout)
    failed, passed = set(), 0
    for report in read if isinstance(read, list) else [read]:
        failed |= {check["check_id"] for check in report["results"]["failed_checks"]}
        passed += report["summary"]["passed"]
    return failed, passed


def each_content_once(services: Iterable[Service], folder: Path, *beginnings: str) -> None:
    """The files with these beginnings of names: most are equal in all services, and a review of all takes a minute."""
    seen = set[bytes]()
    for number, service in enumerate(services):
        for name, content in service.files.items():
            if name.startswith(beginnings or "") and content not in seen:
                seen.add(content)
                file = folder / str(number) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)


def test_a_security_review_of_every_combination_finds_nothing(
    render: Render, reviewers: Path, tmp_path: Path
) -> None:
    for broker, telemetry in itertools.product(BROKERS, TELEMETRIES):
        service = render(broker=broker, deploy="kubernetes", telemetry=telemetry)
        (tmp_path / f"{broker}-{telemetry}.yaml").write_text(built(service, "production"))
    failed, passed = found_by(reviewers, tmp_path, "kubernetes")
    assert failed <= ACCEPTED
    assert passed > 50 * len(BROKERS) * len(TELEMETRIES)


def test_a_security_review_of_the_other_files_finds_nothing(
    render: Render, reviewers: Path, tmp_path: Path
) -> None:
    deploys = itertools.cycle(["compose", "kubernetes", "systemd"])
    answers = zip(itertools.product(BROKERS, ("github", "gitlab")), deploys, strict=False)
    services = [render(broker=broker, deploy=deploy, ci=ci) for (broker, ci), deploy in answers]
    each_content_once(services, tmp_path)
    failed, passed = found_by(reviewers, tmp_path, *FILES)
    assert failed == set()
    assert passed > 50 * len(BROKERS)
    (tmp_path / "planted.yaml").write_text("url: amqp://orders:hunter2hunter2@broker:5672/\n")
    assert found_by(reviewers, tmp_path, "secrets")[0] == {"CKV_SECRET_4"}


GITLEAKS = "github.com/zricethezav/gitleaks/v8@v8.30.1"


@pytest.fixture(scope="session")
def gitleaks() -> str:
    """The installed program, or one that Go has built, which is kept."""

    def make(environment: Path) -> None:
        variables = {name: text for name, text in os.environ.items() if name.startswith("GO")}
        variables["GOBIN"] = str(environment)
        run(program("go"), "install", GITLEAKS, cwd=TEMPLATE, env=variables)

    return shutil.which("gitleaks") or str(environment_of(GITLEAKS, make) / "gitleaks")


def test_a_scanner_of_secrets_finds_none_in_any_file(
    render: Render, gitleaks: str, tmp_path: Path
) -> None:
    others = itertools.cycle(itertools.product(("github", "gitlab"), TELEMETRIES))
    answers = zip(itertools.product(BROKERS, DEPLOYS), others, strict=False)
    services = [
        render(broker=broker, deploy=deploy, ci=ci, telemetry=telemetry)
        for (broker, deploy), (ci, telemetry) in answers
    ]
    each_content_once(services, tmp_path)
    scan = [gitleaks, "dir", "--no-banner", "--log-level=error", "--report-format=json"]
    scan += ["--report-path=-", "."]
    found = json.loads(run(*scan, cwd=tmp_path, check=False).stdout)
    assert [(one["RuleID"], one["File"], one["Match"]) for one in found] == []
    (tmp_path / "planted").write_text("The Secret: `CONSUMER_BROKER_URL=... pytest tests/deploy`\n")
    assert "generic-api-key" in run(*scan, cwd=tmp_path, check=False).stdout


def test_a_security_review_of_the_code_finds_nothing_above_low(
    render: Render, reviewers: Path, tmp_path: Path
) -> None:
    answers = zip(BROKERS, itertools.cycle(TELEMETRIES), strict=False)
    services = [render(broker=broker, telemetry=telemetry) for broker, telemetry in answers]
    each_content_once(services, tmp_path, "src/", "tools/")
    bandit = [str(reviewers / "bandit"), "-r", "-ll", "--format=json", "--output=found.json", "."]
    run(*bandit, cwd=tmp_path, check=False)
    report = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert report["errors"] == []
    assert len(report["metrics"]) > 50 + len(BROKERS)
    found = {(one["filename"], one["line_number"], one["test_id"]) for one in report["results"]}
    assert found == set()
    (tmp_path / "planted.py").write_text("def query(name):\n    return f'SELECT * FROM {name}'\n")
    assert run(*bandit, cwd=tmp_path, check=False).returncode == 1


def test_the_review_sees_a_mutable_tag_and_a_secret_in_the_environment(
    render: Render, reviewers: Path, tmp_path: Path
) -> None:
    text = built(render(deploy="kubernetes"), "production")
    edits = {
        f"@sha256:{'0' * 64}": ":main",
        "imagePullPolicy: Always": "imagePullPolicy: IfNotPresent",
        "      - envFrom:": "      - env:\n        - name: URL\n          valueFrom:\n"
        "            secretKeyRef: {name: order-events, key: broker-url}\n        envFrom:",
    }
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "edited.yaml").write_text(text)
    failed, _ = found_by(reviewers, tmp_path, "kubernetes")
    assert failed - ACCEPTED >= {"CKV_K8S_43", "CKV_K8S_15", "CKV_K8S_35"}


# -- systemd


@pytest.fixture
def unit(render_own: Render, tmp_path: Path, broker: str) -> Path:
    """The unit, with a program that exists."""
    service = render_own(broker=broker, deploy="systemd")
    text = service.read(UNIT)
    started = re.sub("^ExecStart=.*", "ExecStart=/bin/sh", text, flags=re.M)
    assert started != text
    path = tmp_path / "order-events.service"
    path.write_text(started)
    return path


@each_broker
def test_systemd_accepts_the_unit(unit: Path) -> None:
    analyze = program("systemd-analyze")
    result = run(analyze, "verify", "--man=no", str(unit), cwd=unit.parent, check=False)
    complaints = result.stdout
    version = run(analyze, "--version", cwd=unit.parent).stdout.split()[1]
    if int(version.partition(".")[0]) < 254:  # tests/test_under_systemd.py has a newer version
        complaints = re.sub(r".*'Restart(Steps|MaxDelaySec)'.*\n", "", complaints)
    assert (result.returncode, complaints) == (0, "")


@pytest.mark.parametrize("broker", ["sqlite"])
def test_systemd_sees_a_directive_that_is_none(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("PrivateTmp", "PrivateTemp"))
    analyze = program("systemd-analyze")
    result = run(analyze, "verify", "--man=no", str(unit), cwd=unit.parent, check=False)
    assert "PrivateTemp" in result.stdout


@each_broker
def test_the_unit_is_little_exposed(unit: Path) -> None:
    """At most so many points of 100, without running it; a unit without settings has 96."""
    command = ["security", "--offline=true", "--no-pager", "--threshold=15", str(unit)]
    run(program("systemd-analyze"), *command, cwd=unit.parent)


def directives(service: Service) -> dict[str, str]:
    """The last value of each directive."""
    return dict(re.findall(r"^(\w+)=(.*)$", service.read(UNIT), re.M))


def test_the_unit_accepts_notifications_of_the_service_only(render: Render) -> None:
    unit = directives(render(deploy="systemd"))
    assert unit["Type"] == "notify"
    assert unit["NotifyAccess"] == "main"
    assert unit["WatchdogSec"] == "30"


@pytest.mark.parametrize("telemetry", TELEMETRIES)
@each_broker
def test_the_unit_answers_on_loopback_and_its_secret_is_a_credential(
    render: Render, broker: str, telemetry: str
) -> None:
    text = render(broker=broker, deploy="systemd", telemetry=telemetry).read(UNIT)
    variables = dict(re.findall(r"(CONSUMER_\w+)=(\S+)", text))
    port = str(QUESTIONS["_probe_port"])
    assert (variables["CONSUMER_PROBE_HOST"], variables["CONSUMER_PROBE_PORT"]) == (
        "127.0.0.1",
        port,
    )
    assert ("\nProcSubset=pid\n" in text) == (telemetry not in SCRAPED)
    credentials = re.findall(r"^LoadCredential=(.*)", text, re.M)
    if broker == "sqlite":
        assert credentials == []
        assert variables["CONSUMER_BROKER_URL"] == "sqlite:////var/lib/order-events/messages.db"
        return
    assert credentials == ["broker-url:/etc/order-events.broker-url"]
    assert variables["CONSUMER_BROKER_URL_FILE"] == "/run/credentials/%n/broker-url"
    assert "CONSUMER_BROKER_URL" not in variables


def test_the_unit_is_restarted_after_every_failure_but_wrong_settings(render: Render) -> None:
    service = render(deploy="systemd")
    unit = directives(service)
    errors = service.read("src/order_events/runtime/errors.py")
    assert unit["Restart"] == "on-failure"
    assert f"USAGE = {unit['RestartPreventExitStatus']}" in errors
    assert unit["KillMode"] == "mixed"
    assert (unit["RestartSec"], unit["RestartSteps"], unit["RestartMaxDelaySec"]) == (
        "5",
        "6",
        "60",
    )
    connect = float(
        *re.findall(
            r"connect_seconds: float = Field\(default=(\d+)",
            service.read("src/order_events/runtime/settings.py"),
        )
    )
    assert float(unit["TimeoutStartSec"]) > connect
