"""Messages that the engine makes of others: copies of failed ones, smaller ones, what an envelope held."""
