"""Faults that the runtime's tests notice, and code that they reach: ``python3 tasks.py mutate`` and ``coverage``."""
