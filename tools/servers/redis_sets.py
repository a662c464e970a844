"""A pytest plugin: the servers of the tests of Redis are a set of several, by Sentinel or as a cluster.

`VARIABLE` names the set as `CLUSTERS` does. A test that kills its private server kills the master.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "REDIS_SET_OF_TESTS"


def pytest_configure() -> None:
    # Imported after the conftest, which makes pytest rewrite their assertions.
    from harness.servers import redis
    from tools.chaos import clusters

    sets: dict[str, tuple[Any, Any]] = {
        "redis-sentinel": (clusters.redis_sentinel, clusters.RedisBySentinel),
        "redis-cluster": (clusters.redis_cluster, clusters.RedisOfCluster),
    }
    private, by_url = sets[os.environ[VARIABLE]]

    @contextmanager
    def shared(directory: Path) -> Iterator[Any]:
        if url := os.environ.get("CONSUMER_TEST_BROKER_URL"):
            yield by_url(url)
        else:
            with private(directory) as server:
                yield server

    vars(redis).update(private=private, shared=shared)
