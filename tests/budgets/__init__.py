"""What a message may cost: a budget of calls of functions, and one of instructions, for each protocol."""
