"""The demo: a service of three handlers, which handles 3,000 order events on any protocol."""
