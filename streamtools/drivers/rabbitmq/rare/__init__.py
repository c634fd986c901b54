"""Very rare states of a broker. Each has its own file, and is handled by one call."""
