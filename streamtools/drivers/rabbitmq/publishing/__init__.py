"""The producer: publishes with confirms."""
