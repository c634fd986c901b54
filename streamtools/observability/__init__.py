"""Looking at a running service from outside."""
