"""The gate of the proofs: what `check.py` is made of. Standard library only."""
