"""What steering can be: one form per file."""
