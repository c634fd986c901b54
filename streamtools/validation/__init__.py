"""Checks: what users write, and bodies from outside, before anything is done with them."""
