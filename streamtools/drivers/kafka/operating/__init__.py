"""What an operator asks: groups, what waits for them, and reading it without joining them."""
