"""The claims of the theory, one file each, found by number."""
