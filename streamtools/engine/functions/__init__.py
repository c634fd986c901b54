"""Checks the functions of users, compiles them once, and calls them."""
