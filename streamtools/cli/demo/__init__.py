"""The demo: a service of three handlers on 3,000 order events, the same on every protocol."""
