"""Faults of the network, made on purpose."""
