"""Receiving and settling."""
