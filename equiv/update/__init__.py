"""What ΔW is: named parameter differences, dense or in low-rank factors."""
