"""Kafka without a server: the partition of a key, and the marks of a commit, on a model of one partition."""

import random

import pytest
from aiokafka import TopicPartition
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import OffsetAndMetadata
from hypothesis import given
from hypothesis import strategies as st

from runtime.brokers import kafka

MOST_BYTES = (0, 60, kafka.MOST_METADATA_BYTES)
"""Limits of a commit's metadata: room for no marks, for some, and for all marks here."""


class Log:
    """A partition, and the group's commit for it. Some offsets have no message, such as the end of a transaction."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.end = 0
        self.messages: set[int] = set()
        self.settled: set[int] = set()
        self.commit = OffsetAndMetadata(0, "")

    def append(self) -> None:
        for _ in range(self.chance.randrange(30)):
            if self.chance.random() < 0.9:
                self.messages.add(self.end)
            self.end += 1

    def unsettled(self) -> set[int]:
        return self.messages - self.settled


class Owner:
    """The process that has the partition; the source polls, acks and commits like this."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.partition = kafka._Partition(TopicPartition("orders", 0), *kafka._marks_of(log.commit))
        self.fetched = log.commit.offset

    def poll(self, room: int) -> list[int]:
        delivered: list[int] = []
        while self.fetched < self.log.end and len(delivered) < room:
            offset = self.fetched
            self.fetched += 1
            if offset in self.log.messages:
                self.partition.position = offset + 1
                if not self.partition.is_settled(offset):
                    self.partition.unacked.add(offset)
                    delivered.append(offset)
        if not delivered:
            self.partition.position = max(self.partition.position, self.fetched)
        return delivered

    def poll_ten(self) -> None:
        self.poll(10)

    def ack_some(self) -> None:
        for offset in sorted(self.partition.unacked):
            if self.log.chance.random() < 0.5:
                self.partition.unacked.remove(offset)
                self.log.settled.add(offset)

    def commit(self, most_bytes: int) -> None:
        commit = self.partition.commit(most_bytes)
        assert len(commit.metadata) <= most_bytes
        assert commit.offset <= self.log.end, "an offset that does not exist yet is committed"
        if commit.offset >= self.log.commit.offset:
            self.log.commit = commit


@pytest.mark.parametrize("most_bytes", MOST_BYTES)
def test_every_message_that_is_not_settled_goes_to_the_next_owner(most_bytes: int) -> None:
    for _ in range(300):
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        log = Log(chance)
        for _ in range(chance.randrange(1, 8)):
            owner = Owner(log)
            for _ in range(chance.randrange(6)):
                chance.choice([log.append, owner.ack_some, owner.poll_ten])()
            owner.commit(most_bytes)
            log.append()
        delivered = {*Owner(log).poll(room=log.end)}
        assert delivered >= log.unsettled(), f"lost: {log.unsettled() - delivered}, seed {seed}"
        if most_bytes == kafka.MOST_METADATA_BYTES:
            assert delivered == log.unsettled(), f"repeated, seed {seed}"


@pytest.mark.parametrize("metadata", ["", "of another program"])
def test_a_commit_without_marks_says_nothing_of_what_comes(metadata: str) -> None:
    log = Log(random.Random(0))
    log.end = 5
    log.commit = OffsetAndMetadata(5, metadata)
    owner = Owner(log)
    assert owner.poll(1) == []
    owner.commit(kafka.MOST_METADATA_BYTES)
    assert log.commit == OffsetAndMetadata(5, "")


@given(st.binary(max_size=70), st.integers(1, 200))
def test_a_key_has_the_partition_that_other_clients_choose(key: bytes, count: int) -> None:
    partitions = [*range(count)]
    chosen = kafka.partition_for(key, partitions, [])
    assert chosen == DefaultPartitioner()(key, partitions, [])


def test_without_a_key_a_partition_that_can_be_reached_is_chosen() -> None:
    assert {kafka.partition_for(None, [0, 1, 2], [2]) for _ in range(30)} == {2}
    assert {kafka.partition_for(None, [0, 1], []) for _ in range(99)} == {0, 1}
