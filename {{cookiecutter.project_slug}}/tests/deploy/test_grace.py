# cookiecutter-consumer {{ cookiecutter._template_version }} | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The supervisor waits longer than a shutdown may take, even if either setting was edited by hand.

A shutdown takes CONSUMER_DRAIN_SECONDS for the handlers, and up to CLOSE_SECONDS of runtime/watchdog.py to close the
rest. Settings in other places, such as a Secret or another file, are not checked here.
"""

import re
from pathlib import Path

import pytest

from {{ cookiecutter.package_name }}.runtime.settings import ConsumerSettings
from {{ cookiecutter.package_name }}.runtime.watchdog import CLOSE_SECONDS

PROJECT = Path(__file__).resolve().parents[2]

MARGIN_SECONDS = 5
"""For the watchdog's last log lines, the end of the interpreter, and a slow machine."""

# The files of each deployment; a later file overrides an earlier one.
# {% if cookiecutter.deploy == "kubernetes" %}
DEPLOYMENTS = {
    path.name: ["deploy/kubernetes/base/*.yaml", f"deploy/kubernetes/overlays/{path.name}/*.yaml"]
    for path in PROJECT.glob("deploy/kubernetes/overlays/*")
}
GRACE = r"terminationGracePeriodSeconds(?::|\n *value:) *(.+)"  # the second in a JSON patch
# {% elif cookiecutter.deploy == "compose" %}
DEPLOYMENTS = {"compose": ["compose.yaml"]}
GRACE = r"stop_grace_period: *(.+)"
# {% else %}
DEPLOYMENTS = {"systemd": ["deploy/systemd/*.service"]}
GRACE = r"TimeoutStopSec=(.+)"
# {% endif %}
DRAIN = r"""CONSUMER_DRAIN_SECONDS["']?(?:[:=]|\n *value:) *["']?(.+)"""
COMMENT = r"(?m)(^|\s)#.*"


def seconds_set(pattern: str, places: list[str]) -> list[float]:
    """The values in the last file that has any."""
    for place in reversed(places):
        texts = [re.sub(COMMENT, "", file.read_text("utf-8")) for file in PROJECT.glob(place)]
        assert texts, f"there is no {place}"
        if found := [value for text in texts for value in re.findall(pattern, text)]:
            # {% if cookiecutter.deploy == "kubernetes" %}
            return [float(value.strip("\"' ")) for value in found]
            # {% else %}
            return [seconds_of(value) for value in found]
            # {% endif %}
    return []


# {% if cookiecutter.deploy != "kubernetes" %}
def seconds_of(value: str) -> float:
    """``40``, ``"40"``, ``40s``, ``1m30s`` or ``1min 30s``."""
    match = re.fullmatch(r"(?:(\d+) *m(?:in)?)? *(?:(\d+(?:\.\d+)?) *s?)?", value.strip("\"' "))
    assert match, f"{value!r} is no number of seconds"
    return 60 * float(match[1] or 0) + float(match[2] or 0)


# {% endif %}
def test_there_is_a_deployment() -> None:
    assert DEPLOYMENTS


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_grace_period_is_long_enough_for_a_stop(name: str) -> None:
    grace = seconds_set(GRACE, DEPLOYMENTS[name])
    assert grace, "there is no grace period"
    grace_seconds = min(grace)
    by_default = float(ConsumerSettings.model_fields["drain_seconds"].default)
    drain_seconds = max(seconds_set(DRAIN, DEPLOYMENTS[name]), default=by_default)
    stop_seconds = drain_seconds + CLOSE_SECONDS + MARGIN_SECONDS
    assert stop_seconds <= grace_seconds, (
        f"the supervisor kills after {grace_seconds:g} seconds, and a stop may take {stop_seconds:g}:"
        f" {drain_seconds:g} to drain, {CLOSE_SECONDS:g} to close, {MARGIN_SECONDS} to spare"
    )
