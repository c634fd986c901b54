"""Handler modules, each with a factory of its own; `examples/run.py` runs them together."""
