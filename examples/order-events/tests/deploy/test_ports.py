# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The network policy allows every port that the pods connect to.

`CONSUMER_BROKER_URL=... pytest tests/deploy` checks the URL that you are about to put into the cluster; without it,
that of `.env.example` is checked.
"""

import os
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
KUBERNETES = PROJECT / "deploy/kubernetes"
ALLOWED = r"\bport(?::|, value:|\n *value:) *(\d+)"
ADDRESS = r"(?:address|bootstrapServers)\b.*?\w:(\d+)"
DEFAULT_PORTS = {"http": "80", "https": "443"}  # a collector's
DEFAULT_PORTS |= {"amqp": "5672", "amqps": "5671"}


@pytest.mark.parametrize("overlay", [path.name for path in KUBERNETES.glob("overlays/*")])
def test_the_network_policy_allows_the_ports_that_are_set(overlay: str) -> None:
    [example] = re.findall(r"(?m)^CONSUMER_BROKER_URL=(.*)", (PROJECT / ".env.example").read_text())
    policy = (KUBERNETES / "base/network-policy.yaml").read_text("utf-8").partition("egress:")[2]
    files = KUBERNETES.glob(f"overlays/{overlay}/*.yaml")
    text = "\n".join([policy, *(file.read_text("utf-8") for file in files)])
    text = re.sub(r"(?m)(^|\s)#.*", "", text)
    urls = [os.environ.get("CONSUMER_BROKER_URL", example), *re.findall(r"_ENDPOINT=(\S+)", text)]
    needed = re.findall(ADDRESS, text)
    for scheme, _, rest in (url.partition("://") for url in urls):
        for server in filter(None, re.split("[/?]", rest.rpartition("@")[2])[0].split(",")):
            needed += re.findall(r":(\d+)$", server) or [DEFAULT_PORTS[scheme.rpartition("+")[2]]]
    denied = {*needed} - {*re.findall(ALLOWED, text)}
    assert not denied, f"no egress to {', '.join(sorted(denied))}: edit base/network-policy.yaml"
