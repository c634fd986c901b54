"""Declares, checks and compares queues, exchanges, bindings and delay levels."""
