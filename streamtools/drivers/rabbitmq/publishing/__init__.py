"""Sending with confirms."""
