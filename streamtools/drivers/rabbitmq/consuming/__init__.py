"""The consumer: receives and settles."""
