"""Tools for event loops, tasks, threads and signals."""
