"""One module per broker: the consumers that the generated service is compared with."""
