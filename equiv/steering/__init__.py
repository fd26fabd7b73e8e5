"""What replaces the update: forms of steering, their fits, and how they are applied."""
