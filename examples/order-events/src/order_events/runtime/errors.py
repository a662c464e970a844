# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Every error that ends the service or a command, and every exit code::

    ServiceError
    ├── UsageError             2   the command line cannot be executed
    ├── SettingsError          2   a setting has a wrong value
    ├── HandlerError           2   a handler's signature cannot be used
    └── BrokerError
        ├── BrokerRefused      2   the broker refused: other arguments, another program's file
        │   └── MendableRefusal   77   TLS failed, or a certificate's file or the virtual host is missing
        │       └── BrokerDenied  77   it refused the login, or a right is missing
        ├── BrokerUnavailable  69  the broker does not answer at present: try again
        └── SourceFailed       1   the source failed while consuming, and cannot recover

The text of each is one sentence for an operator, without a password. The exceptions by which a handler settles its
own message, `Retry`, `Pause` and `Reject`, are in message.py: they never leave the consumer.
"""

from enum import IntEnum
from signal import Signals


class ExitCode(IntEnum):
    """The exit codes of every command; a supervisor can rely on them."""

    DRAINED = 0
    """Done; after a signal: drained, with every in-flight message settled."""
    CRASHED = 1
    """The service failed; or ``check --vendored`` found a difference, or ``check`` a missing queue."""
    USAGE = 2
    """An invalid setting, handler or command line, or a refusal of the broker."""
    UNAVAILABLE = 69
    """The broker could not be reached at start, within ``CONSUMER_CONNECT_SECONDS``."""
    DEADLINE = 75
    """The drain time passed, and in-flight messages were requeued."""
    DENIED = 77
    """The broker refused the login, a right, TLS or the virtual host: an administrator can fix it."""


def forced_exit_code(signum: Signals | int) -> int:
    """The exit code of a process that this signal ended, as a shell would report it."""
    return 128 + signum


class ServiceError(Exception):
    """One sentence for an operator; see the tree above."""

    exit_code = ExitCode.USAGE
    is_shown = False  # whether the log has shown it on the terminal


class UsageError(ServiceError):
    """The command line cannot be executed."""


class SettingsError(ServiceError):
    """A setting has a wrong value: one line that names the variable, never the value."""


class HandlerError(ServiceError):
    """A handler's signature cannot be used: one sentence that names the handler."""


class BrokerError(ServiceError):
    """A failure of the broker, with its address but without credentials."""


class BrokerRefused(BrokerError):
    """The broker refused, and would refuse again: the request is not repeated."""


class MendableRefusal(BrokerRefused):
    """At start, the service exits; later it is an outage, because an administrator can fix it while the service runs."""

    exit_code = ExitCode.DENIED


class BrokerDenied(MendableRefusal):
    """The broker refused the login, or a right is missing."""


class BrokerUnavailable(BrokerError):
    """The broker does not answer at present: try again."""

    exit_code = ExitCode.UNAVAILABLE


class SourceFailed(BrokerError):
    """The source failed while consuming and cannot recover: the service drains and exits."""

    exit_code = ExitCode.CRASHED
