"""Commands of rabbitmqctl, on a private RabbitMQ of the harness."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness.servers import PrivateServer
from harness.servers.local import ServerContainer, docker


def control_of(server: PrivateServer) -> Callable[..., object]:
    """Runs a command on this server: ``control("add_user", "me", "secret")``."""
    instance = server.instance
    if isinstance(instance, ServerContainer):
        return partial(docker, "exec", instance.id, "rabbitmqctl")
    [script], environment = instance.command, instance.environment
    assert environment is not None
    program = [str(Path(script).with_name("rabbitmqctl")), "-n", environment["RABBITMQ_NODENAME"]]

    def control(*command: str) -> None:
        subprocess.run([*program, *command], env=environment, check=True, stdout=subprocess.DEVNULL)

    return control
