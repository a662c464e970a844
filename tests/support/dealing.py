"""The order in which pytest's workers get the tests."""

from typing import Any


def dealt(items: list[Any], longest: list[bool], workers: int) -> list[Any]:
    """Each worker but the first, which has the waiting tests, begins with some of the longest: the last would run alone.

    `--dist worksteal` gives each worker at first one part of the list, all of the same size.
    """
    long = [item for item, is_long in zip(items, longest, strict=True) if is_long]
    rest = [item for item, is_long in zip(items, longest, strict=True) if not is_long]
    if workers == 1 or len(long) > len(rest) // workers:
        return [*long, *rest]
    order: list[Any] = []
    for worker in range(workers):
        first = long[worker - 1 :: workers - 1] if worker else []
        size = (len(items) - len(order)) // (workers - worker) - len(first)
        order += [*first, *rest[:size]]
        del rest[:size]
    return order
