"""One check under way."""
