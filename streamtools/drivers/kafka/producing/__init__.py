"""Sending: records on their way, one queue for each partition, one producing client for all, transactions."""
