"""Apache Kafka for the tests, on a machine with Maven and Java 17 or later but without Docker.

Maven Central has Kafka as jars; here they run as one node that is broker and controller (KRaft). As a program::

    python -m tools.kafka                                # prints the variable that the tests read
    python -m tools.kafka --port 9092 --directory DIR    # runs a broker on 127.0.0.1 until it is killed

The directory keeps its data, so a broker that was killed can be started again.
"""

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
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
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={directory}/{port}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
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
    """For CONSUMER_TEST_BROKER_COMMAND; the first broker that it starts is also installed by it."""
    # With the path of this repository, as a service's tests may run it.
    program = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tools.kafka"]
    return shlex.join([*program, "--port", "{port}", "--directory", "{directory}"])


def variables_for(broker: str) -> dict[str, str]:
    """The environment variables that the tests of this broker need: none, unless Kafka must be found for them."""
    given = {"CONSUMER_TEST_BROKER_URL", "CONSUMER_TEST_BROKER_COMMAND"} & os.environ.keys()
    if broker != "kafka" or given:
        return {}
    try:
        return variables()
    except KafkaMissing as reason:  # the tests look for Docker next
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


def run(port: int, directory: Path) -> None:
    """Become a broker on this port, with the data of the directory. Does not return."""
    java = ["java", HEAP, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{install()}/*"]
    properties = directory / f"{port}.properties"
    if not properties.exists():
        values = {"port": port, "controller_port": _free_port(), "directory": directory}
        properties.write_text(PROPERTIES.format(**values), encoding="utf-8")
        format_storage = ["kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c"]
        subprocess.run([*java, *format_storage, str(properties)], check=True)
    os.execvp("java", [*java, "kafka.Kafka", str(properties)])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def main() -> None:
    parser = argparse.ArgumentParser(description="Apache Kafka for the tests.")
    parser.add_argument("--port", type=int, help="run a broker on this port of 127.0.0.1")
    parser.add_argument("--directory", type=Path, help="the folder for its data")
    arguments = parser.parse_args()
    try:
        if arguments.port and arguments.directory:
            run(arguments.port, arguments.directory.resolve())
        for name, value in variables().items():
            print(f"export {name}={shlex.quote(value)}")
    except KafkaMissing as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
