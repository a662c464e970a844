"""How many replicas a rate needs, and how an autoscaler reacts to it: the model of docs/scaling.md.

Seconds everywhere, rates in messages per second. Standard library only. tests/test_scaling.py compares ``throughput`` with
the measurements of scaling.py; ``simulate`` is where the advice on KEDA's settings comes from.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

SYNC_SECONDS = 15.0
"""How often the HorizontalPodAutoscaler, which KEDA makes, asks for the lag."""
TOLERANCE = 0.1
"""A lag that is off its target by less than this ratio changes nothing."""
NEXT_TO_NOTHING = 0.01
"""A replica that adds less than this part of one replica's rate is useless: the shared resource is exhausted."""
FASTEST_PODS = 4
"""In one period of 15 seconds it adds four pods or doubles them, whichever is more: its default."""


@dataclass(frozen=True)
class Service:
    """One replica, and the resources that it shares with the others."""

    handler_seconds: float
    """The seconds of a handler, waiting included; and those that the runtime and the broker add to each message."""
    concurrency: int = 10
    cpu_seconds: float = 0.0
    """CPU of the replica's process for each message: an event loop has one core, even on a machine with many."""
    shared_seconds: float = 0.0
    """For each message, at the resource that all replicas share: 1 / the broker's maximum deliveries per second."""
    partitions: int | None = None
    """More replicas than partitions have nothing to do; None if any replica gets any message."""

    @property
    def pod_rate(self) -> float:
        """The rate of one replica that always has work."""
        return self.throughput(1)

    @lru_cache(maxsize=1000)  # noqa: B019  # few values: a simulation asks every second
    def throughput(self, replicas: int) -> float:
        """The rate of this many replicas that always have work: all of their slots circulate between their handlers,
        the event loop of each replica, and the one shared resource; where other slots are, a slot waits.
        (Mean value analysis of a closed network of queues.)
        """
        working = min(replicas, self.partitions or replicas)
        demands = [self.cpu_seconds / working, self.shared_seconds]
        loops = [working, 1]
        queues = [0.0, 0.0]
        rate = 0.0
        for slots in range(1, working * self.concurrency + 1):
            answers = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
            seconds = sum(number * answer for number, answer in zip(loops, answers, strict=True))
            rate = slots / (self.handler_seconds + seconds)
            queues = [rate * answer for answer in answers]
        return rate

    def calibrated(self, pod_rate: float) -> "Service":
        """The same service with a handler time that gives one replica this rate."""
        service = self
        for _ in range(100):
            off = self.concurrency * (1 / pod_rate - 1 / service.pod_rate)
            service = replace(service, handler_seconds=service.handler_seconds + off)
        return service

    def replicas(
        self,
        rate: float,
        *,
        headroom: float = 0.2,
        away_seconds: float = 60.0,
        catch_up_seconds: float = 300.0,
    ) -> int | None:
        """The fewest replicas that handle the rate and ``headroom`` more, and that make up within ``catch_up_seconds``
        for one absent replica, which was killed, or drained, and then started again. None if no number does.
        """
        # The replicas' rate is at most this many times one replica's rate, so fewer are not enough.
        fewest = max(1, math.ceil(rate * (1 + headroom) / self.pod_rate))
        rest = self.throughput(fewest - 1) if fewest > 1 else 0.0
        for replicas in count(fewest):
            all_of_them = self.throughput(replicas)
            if all_of_them - rest < NEXT_TO_NOTHING * self.pod_rate:
                return None
            backlog = max(0.0, rate - rest) * away_seconds
            if (
                all_of_them >= rate * (1 + headroom)
                and backlog <= (all_of_them - rate) * catch_up_seconds
            ):
                return replicas
            rest = all_of_them
        raise AssertionError


@dataclass(frozen=True)
class Autoscaler:
    """The settings of KEDA, and of the HorizontalPodAutoscaler that it creates."""

    threshold: float
    """Messages for each pod: lagThreshold, queueLength, value, lagCount or targetQueryValue."""
    least: int = 1
    most: int = 20
    polling_seconds: float = SYNC_SECONDS
    """KEDA polls at its pollingInterval only with useCachedMetrics, or from no pod to the first."""
    cooldown_seconds: float = 300.0
    """The highest wanted number of this time is kept: stabilizationWindowSeconds of scaleDown."""

    def wanted(self, lag: float, replicas: int) -> int:
        ratio = lag / (self.threshold * replicas)
        wanted = replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(lag / self.threshold)
        fastest = max(replicas + FASTEST_PODS, 2 * replicas)
        return max(self.least, min(wanted, self.most, fastest))


@dataclass(frozen=True)
class Moment:
    at_seconds: float
    replicas: int
    """The replicas that are wanted; some may not have started yet."""
    lag: float
    """The messages in the broker, in-flight ones included."""
    arrived: float
    """Messages so far."""
    begun: float
    """Messages so far that a handler has or had."""


def simulate(
    service: Service,
    autoscaler: Autoscaler,
    rate_at: Callable[[float], float],
    seconds: int,
    start_seconds: float = 20.0,
) -> Iterator[Moment]:
    """A queue whose lag decides how many replicas there are, second by second."""
    replicas = autoscaler.least
    ready = deque([(0.0, replicas)])
    """When so many are ready."""
    lately: deque[tuple[float, int]] = deque()
    lag = arrived = 0.0
    running = replicas
    look_at = autoscaler.polling_seconds
    for now in map(float, range(seconds)):
        while ready and ready[0][0] <= now:
            running = ready.popleft()[1]
        running = min(running, replicas)  # a pod that will be removed takes no new message
        capacity = service.throughput(running)
        arriving = rate_at(now)
        arrived += arriving
        lag = max(lag + arriving - capacity, min(arriving, capacity) * service.handler_seconds)
        in_flight = min(lag, running * service.concurrency)
        yield Moment(now, replicas, lag, arrived, arrived - lag + in_flight)
        if now >= look_at:
            look_at += autoscaler.polling_seconds
            wanted = autoscaler.wanted(lag, replicas)
            lately.append((now, wanted))
            while lately[0][0] < now - autoscaler.cooldown_seconds:
                lately.popleft()
            if wanted < replicas:  # never more than there are: only removals wait
                wanted = min(replicas, max(number for _, number in lately))
            if wanted > replicas:
                ready.append((now + start_seconds, wanted))
            replicas = wanted


def threshold(service: Service, wait_seconds: float) -> float:
    """Messages for each pod, if a message may wait so long: the number that a pod handles in that time."""
    return service.pod_rate * wait_seconds


def longest_wait(moments: Sequence[Moment]) -> float:
    """The longest wait of a message, from its arrival until a handler begins it."""
    longest, later = 0.0, 0
    for moment in moments:
        while later < len(moments) - 1 and moments[later].begun < moment.arrived - 1e-6:
            later += 1
        longest = max(longest, moments[later].at_seconds - moment.at_seconds)
    return longest
