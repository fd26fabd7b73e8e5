"""What the steered model does: KL, agreement, loss, output difference."""
