"""Commands of rabbitmqctl, on a private RabbitMQ of the harness."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness.servers import PrivateServer
from harness.servers.local import ServerContainer, docker

AT_EASE = {"RABBITMQ_CTL_ERL_ARGS": "+S 1:1 +sbwt none"}
"""Like the servers: otherwise the threads of another Erlang would spin while they wait for each other, for seconds."""


def control_of(server: PrivateServer) -> Callable[..., object]:
    """Runs a command on this server: ``control("add_user", "me", "secret")``."""
    instance = server.instance
    if isinstance(instance, ServerContainer):
        return partial(docker, "exec", instance.id, "rabbitmqctl")
    [script], environment = instance.command, instance.environment
    assert environment is not None
    environment = {**environment, **AT_EASE}
    program = [str(Path(script).with_name("rabbitmqctl")), "-n", environment["RABBITMQ_NODENAME"]]

    def control(*command: str) -> None:
        subprocess.run([*program, *command], env=environment, check=True, stdout=subprocess.DEVNULL)

    return control
