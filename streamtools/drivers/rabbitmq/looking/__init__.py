"""For operators: queues listed, looked at and changed."""
