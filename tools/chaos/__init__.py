"""Faults in processes, network and broker, and a reconciliation of every message: ``python3 tasks.py chaos``."""
