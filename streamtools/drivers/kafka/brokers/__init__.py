"""Asking the brokers: topics, offsets, and the bindings that stand in a topic of their own."""
