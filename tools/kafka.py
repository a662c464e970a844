"""Apache Kafka for the tests, on a machine with Maven and Java 17 or later but without Docker.

Maven Central has Kafka as jars; here they run as nodes that are both broker and controller (KRaft). As a program::

    python -m tools.kafka                                # prints the variable that the tests read
    python -m tools.kafka --port 9092 --directory DIR    # runs a broker on 127.0.0.1 until it is killed
    python -m tools.kafka --port 9092 --directory DIR --nodes 3    # a cluster, on 9092, 9093 and 9094

The directory keeps its data, so a broker that was killed can be started again.
"""

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from tools import ROOT

VERSION = "4.4.0"
HOME = ROOT / ".cache" / f"kafka-{VERSION}"
CLUSTER = "Y29va2llY3V0dGVyLWNvbg"  # a base64 UUID
HEAP = "-Xmx384m"

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tests</groupId> <artifactId>kafka</artifactId> <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId> <artifactId>kafka_2.13</artifactId> <version>{VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""

PROPERTIES = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={directory}/{port}
default.replication.factor={replicas}
min.insync.replicas={majority}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={majority}
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=1500
broker.heartbeat.interval.ms=300
num.network.threads=2
num.io.threads=2
log.cleaner.dedupe.buffer.size=2097152
"""


class KafkaMissing(Exception):
    """Apache Kafka is not available here; the text says why."""


def variables() -> dict[str, str]:
    """The environment variable by which a service's tests start a broker. Raises KafkaMissing."""
    install()
    return {"CONSUMER_TEST_BROKER_COMMAND": command()}


def command() -> str:
    """The command for CONSUMER_TEST_BROKER_COMMAND; the first broker that it starts also installs Kafka."""
    # It has the path of this repository, since a service's tests may run it.
    program = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tools.kafka"]
    return shlex.join([*program, "--port", "{port}", "--directory", "{directory}"])


def variables_for(broker: str) -> dict[str, str]:
    """The environment variables that the tests of this broker need: none, except for Kafka."""
    given = {"CONSUMER_TEST_BROKER_URL", "CONSUMER_TEST_BROKER_COMMAND"} & os.environ.keys()
    if broker != "kafka" or given:
        return {}
    try:
        return variables()
    except KafkaMissing as reason:  # the tests try Docker next
        print(reason, file=sys.stderr)
        return {}


def install() -> Path:
    """The folder with Kafka's jars; Maven fetches them the first time. Raises KafkaMissing."""
    jars = HOME / "jars"
    HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(HOME.with_suffix(".lock")):
        if not (HOME / "complete").exists():
            for program in ("mvn", "java"):
                if shutil.which(program) is None:
                    msg = f"Apache Kafka needs {program} (Debian: maven, openjdk-17-jre-headless)"
                    raise KafkaMissing(msg)
            (HOME / "pom.xml").write_text(POM, encoding="utf-8")
            command = ["mvn", "--quiet", "--batch-mode", "--strict-checksums", "--file", "pom.xml"]
            goal = ["dependency:copy-dependencies", "-DincludeScope=runtime"]
            done = subprocess.run(
                [*command, *goal, f"-DoutputDirectory={jars}"],
                cwd=HOME,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode != 0:
                msg = f"Maven could not fetch Apache Kafka {VERSION}: {done.stdout[-500:]}"
                raise KafkaMissing(msg)
            (HOME / "complete").touch()
    return jars


def node_commands(ports: Sequence[int], directory: Path) -> list[list[str]]:
    """The commands that start a node on each of these ports, with its data in the directory. They are one cluster."""
    java = ["java", HEAP, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{install()}/*"]
    files = [directory / f"{port}.properties" for port in ports]
    if not files[-1].exists():
        controllers = [_free_port() for _ in ports]
        voters = [f"{node}@127.0.0.1:{port}" for node, port in enumerate(controllers, 1)]
        for node, (port, file) in enumerate(zip(ports, files, strict=True), 1):
            values = {"port": port, "controller_port": controllers[node - 1], "node": node}
            sizes = {"replicas": len(ports), "majority": len(ports) // 2 + 1}
            cluster = {"voters": ",".join(voters), "directory": directory, **sizes}
            file.write_text(PROPERTIES.format(**values, **cluster), encoding="utf-8")
            command = [*java, "kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c", str(file)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                msg = f"the folder of a Kafka cannot be made: {done.stderr[-500:]}"
                raise RuntimeError(msg)
    return [[*java, "kafka.Kafka", str(file)] for file in files]


def run(ports: Sequence[int], directory: Path) -> None:
    """Become a broker on this port, or the parent of a broker on each; until it is killed."""
    commands = node_commands(ports, directory)
    if len(commands) == 1:
        os.execvp("java", commands[0])
    nodes = [subprocess.Popen(command) for command in commands]
    try:
        for node in nodes:
            node.wait()
    finally:
        for node in nodes:
            node.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def main() -> None:
    parser = argparse.ArgumentParser(description="Apache Kafka for the tests.")
    parser.add_argument("--port", type=int, help="run a broker on this port of 127.0.0.1")
    parser.add_argument("--directory", type=Path, help="the folder for its data")
    parser.add_argument("--nodes", type=int, default=1, help="on this port and the next ones")
    arguments = parser.parse_args()
    try:
        if arguments.port and arguments.directory:
            ports = range(arguments.port, arguments.port + arguments.nodes)
            run(ports, arguments.directory.resolve())
        for name, value in variables().items():
            print(f"export {name}={shlex.quote(value)}")
    except KafkaMissing as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
