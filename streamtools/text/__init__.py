"""Text for people: escaped, cut to size, and made in little time."""
