# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The runtime: takes messages, calls handlers, settles, and shuts down gracefully.

The path of a message, and of a shutdown::

    broker ──> fetcher ──> Buffer ──> worker: cancellable_aiter ──> Router ──> your handler
                 │           │          │                                          │
                 │           │          └── publish, ack, retry, reject <── returned, raised
    SIGTERM: 1 stops      2 requeued    3 finishes, or is cancelled and requeued at the deadline

Read in this order; the other files serve these:

1. `message`          the message, and the exceptions by which a handler settles it
2. `cancellation`     the event that a signal sets, and the iterator that ends when the event is set
3. `brokers.delivery` how any delivery becomes a message
4. `brokers.buffer`   the deliveries that no worker has taken yet
5. `brokers.source`   fetching, settling, requeueing: the contract of every broker
6. `handlers`         signatures, routing by type; with `formats`, decoding
7. `consumer`         the workers, and the drain; `publishing`: messages that handlers publish; `limits`: time limits;
                      `pause`: while a dependency is down
8. one broker         such as ``brokers/rabbitmq.py``, with `brokers.url`, `brokers.requests` and `brokers.connectivity`

`service.serve` is the whole life of the process; `watchdog` ends it when the event loop is blocked; `errors` has
every error and exit code. Commands that a consuming process does not need are in `operate`; for tests of handlers
there is `testing`.
"""
