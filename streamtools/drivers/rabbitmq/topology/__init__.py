"""Queues, exchanges, bindings and delays: declared, checked and compared."""
