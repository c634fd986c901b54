"""Event loops, tasks, threads and signals."""
