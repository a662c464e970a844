"""Faults in processes, network and broker, and a reconciliation of every message: ``python3 tasks.py chaos``."""


class Stuck(Exception):
    """What an experiment waited for did not come in time; the text says what, and for how long."""
