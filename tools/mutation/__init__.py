"""What the tests of the runtime notice and reach: ``python3 tasks.py mutate`` and ``coverage``."""
