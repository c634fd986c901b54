"""Broker states that are very rare. Each has a file of its own and is reached by one call."""
