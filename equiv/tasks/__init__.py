"""Tasks: their data, prompts and scoring."""
