"""Checks what users write, and checks bodies from outside before they are handled."""
