"""Faults in processes, network and broker, and a reconciliation of every message: ``python3 tasks.py chaos``."""


class Stuck(Exception):
    """An experiment waited too long; the text says for what, and for how long."""
