"""What ΔW does to activations: propagated streams, Taylor test, radius, measures."""
