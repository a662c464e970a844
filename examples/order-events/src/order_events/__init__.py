"""The order-events service."""
