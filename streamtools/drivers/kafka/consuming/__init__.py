"""Receiving: a member of a group, its partitions, what is finished of them, and what waits for its time."""
