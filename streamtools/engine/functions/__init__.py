"""Functions of users: checked, compiled once, and called."""
