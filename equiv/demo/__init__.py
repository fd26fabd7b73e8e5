"""The shipped small model, its two fine-tunes, and the script that made them."""
