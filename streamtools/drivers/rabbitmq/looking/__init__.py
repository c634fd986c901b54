"""The operator's side: lists, reads and changes queues."""
