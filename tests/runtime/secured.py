"""Servers that require a password or speak TLS, for the tests of connecting to each broker."""

import base64
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

from harness.servers import Server, nats, postgres, rabbitmq
from harness.servers.mqtt import ODD_USER as USER_OF_MQTT
from harness.servers.mqtt import PrivateMosquitto
from harness.servers.proxy import Proxy, proxy_type
from harness.servers.redis import RedisServer

ODD_USER = ("order:events", "p@ss:w/o?r#d %2F+é")
"""A user's name and password with the characters that a URL must encode."""
ODD_VHOST = "eu/order events"
READER = ("reader", "reads-and-writes")
"""A user of RabbitMQ who may not declare queues."""

NATS_USERS = f"""
authorization {{ users: [ {{ user: "{ODD_USER[0]}", password: "{ODD_USER[1]}" }} ] }}
"""
NATS_TLS = """
tls { cert_file: "DIR/server.pem", key_file: "DIR/server.key", ca_file: "DIR/ca.pem", verify: true }
"""
POSTGRES_ACCESS = "hostssl all client all cert\n"
POSTGRES_TLS = {
    "ssl_cert_file": "server.pem",
    "ssl_key_file": "server.key",
    "ssl_ca_file": "ca.pem",
    "ssl": "on",
}


def with_user(url: str, name: str, password: str) -> str:
    """The URL with these credentials instead of its own."""
    parts = urlsplit(url)
    credentials = f"{quote(name, safe='')}:{quote(password, safe='')}"
    netloc = f"{credentials}@{parts.netloc.rpartition('@')[2]}"
    return parts._replace(netloc=netloc).geturl()


# -- private servers: each gets its own folder, and the folder with the certificates


@contextmanager
def rabbitmq_with_users(directory: Path, certificates: Path) -> Iterator[Server]:
    """A RabbitMQ with the users `ODD_USER`, who also has `ODD_VHOST`, and `READER`."""
    users = [("guest", "guest"), ODD_USER, READER]
    rights = [("guest", "/", ".*"), (READER[0], "/", "^$")]
    rights += [(ODD_USER[0], vhost, ".*") for vhost in ("/", ODD_VHOST)]
    definitions = {
        "vhosts": [{"name": "/"}, {"name": ODD_VHOST}],
        "users": [
            {"name": name, "password_hash": _password_hash(password), "tags": ""}
            for name, password in users
        ],
        "permissions": [
            {"user": user, "vhost": vhost, "configure": configure, "write": ".*", "read": ".*"}
            for user, vhost, configure in rights
        ],
    }
    if rabbitmq.find_script() is None:
        pytest.skip("no rabbitmq-server can be started with users")
    (directory / "definitions.json").write_text(json.dumps(definitions))
    (directory / "rabbitmq.conf").write_text(f"load_definitions = {directory}/definitions.json\n")
    with rabbitmq.private(directory) as server:
        yield server


def _password_hash(password: str) -> str:
    """A hash in the format of RabbitMQ: a salt of four bytes, and the SHA-256 of salt and password."""
    salt = os.urandom(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


@contextmanager
def nats_with_users(directory: Path, certificates: Path) -> Iterator[Server]:
    with _nats_with(NATS_USERS, directory) as server:
        yield server


@contextmanager
def nats_with_tls(directory: Path, certificates: Path) -> Iterator[Server]:
    with _nats_with(NATS_TLS.replace("DIR", str(certificates)), directory) as server:
        yield server


def _nats_with(configuration: str, directory: Path) -> AbstractContextManager[nats.PrivateNats]:
    if (program := nats.find_program()) is None:
        pytest.skip("no nats-server can be started with another configuration")
    return nats.installed(program, directory, configuration)


@contextmanager
def secured_postgres(directory: Path, certificates: Path) -> Iterator[Server]:
    """A PostgreSQL with the users `ODD_USER`, and ``client``, who has a certificate only."""
    with postgres.private(directory) as server:
        assert isinstance(server, postgres.PrivatePostgres)
        if server.data is None:
            pytest.skip("the directory of a server in docker cannot be reached")
        for name in ("server.pem", "server.key", "ca.pem"):
            copy = Path(shutil.copy(certificates / name, server.data))
            copy.chmod(0o600)  # the server requires that only it can read its key
            if os.geteuid() == 0:
                shutil.chown(copy, server.data.stat().st_uid, server.data.stat().st_gid)
        server.query(f"CREATE USER \"{ODD_USER[0]}\" PASSWORD '{ODD_USER[1]}'")
        server.query("CREATE USER client")
        for name in (ODD_USER[0], "client"):
            server.query(f'CREATE SCHEMA "of {name}" AUTHORIZATION "{name}"')
        try:
            for name, value in POSTGRES_TLS.items():
                server.query(f"ALTER SYSTEM SET {name} = '{value}'")
        except asyncpg.PostgresError as error:
            pytest.skip(f"this PostgreSQL was built without TLS: {error}")
        access = server.data / "pg_hba.conf"
        access.write_text(POSTGRES_ACCESS + access.read_text())
        server.query("SELECT pg_reload_conf()")
        while server.query("SHOW ssl")[0][0] != "on":
            time.sleep(0.05)
        yield server


Start = Callable[[Callable[[Path, Path], AbstractContextManager[Server]]], str]
"""Gives the URL of such a server, and starts each only once: the fixture `start_secured`."""


# -- users

CHECKS_NO_PASSWORD = {"sqs": "moto accepts every secret"}


@contextmanager
def login(broker: str, server: Server, start: Start) -> Iterator[str]:
    """The URL of a user whose name and password have the characters that a URL must encode."""
    if broker == "rabbitmq":
        yield with_user(start(rabbitmq_with_users), *ODD_USER)
    elif broker == "nats":
        yield with_user(start(nats_with_users), *ODD_USER)
    elif broker == "postgres":
        url = with_user(start(secured_postgres), *ODD_USER)
        yield f"{url}?schema=of%20{quote(ODD_USER[0])}"
    elif broker == "redis":
        assert isinstance(server, RedisServer)
        name = f"{ODD_USER[0]}-{uuid.uuid4()}"
        with server.client() as client:
            rights = ("reset", "on", f">{ODD_USER[1]}", "~*", "+@all")
            client.execute_command("ACL", "SETUSER", name, *rights)
            yield with_user(server.url, name, ODD_USER[1])
            client.execute_command("ACL", "DELUSER", name)
    elif broker == "mqtt":
        assert isinstance(server, PrivateMosquitto)
        yield with_user(server.url, *USER_OF_MQTT)
    elif broker == "sqs":
        yield server.url  # it already has a secret
    else:
        pytest.skip(f"the {broker} of these tests knows no users")


# -- TLS

TLS_FILES = {
    "redis": ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"),
    "postgres": ("sslrootcert", "sslcert", "sslkey"),
    "sqs": ("cafile",),
}
"""The options of the URL that name the CA, and the client's certificate and key if it can have one."""
TLS_OPTION = {"postgres": "sslmode=verify-full", "sqs": "tls=true"}
"""The option of the URL that turns TLS on, if its scheme does not."""


def tls_files(broker: str) -> tuple[str, ...]:
    return TLS_FILES.get(broker, ("cafile", "certfile", "keyfile"))


def tls_proxy_of(broker: str, server: Server, start: Start, certificates: Path) -> Proxy:
    """A proxy to the broker behind TLS, which requires a client's certificate if the URL can name one."""
    if broker == "nats":  # TLS begins after the server's first line, so the server speaks it
        return Proxy(start(nats_with_tls).replace("nats:", "tls:"))
    if broker == "postgres":  # here TLS begins after a request in plain text
        port = urlsplit(start(secured_postgres)).port
        return Proxy(f"postgres://client@127.0.0.1:{port}/postgres?schema=of%20client")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    if len(tls_files(broker)) > 1:
        context.verify_mode = ssl.CERT_REQUIRED
    return proxy_type(server.url)(server.url, tls=context)


def make_certificates(directory: Path) -> None:
    """A CA with a server's and a client's certificate that it has signed; and another CA."""
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    for ca in ("ca", "other"):
        openssl(
            *("req", "-x509", *new_key, "-subj", f"/CN={ca}", "-days", "2"),
            *("-addext", "keyUsage=critical,keyCertSign"),
            *("-keyout", f"{ca}.key", "-out", f"{ca}.pem"),
        )
    (directory / "extensions").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
    )
    for name in ("server", "client"):
        openssl(
            *("req", *new_key, "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-days", "2", "-extfile", "extensions"),
            *("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.pem"),
        )


def once_for_all_workers(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]
) -> Path:
    """A directory that the first process of a test run creates for all of them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        directory = factory.mktemp(name)
        make(directory)
        return directory
    from fcntl import LOCK_EX, flock  # not on Windows

    directory = factory.getbasetemp().parent / name
    with directory.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if not directory.exists():
            directory.mkdir()
            make(directory)
    return directory
