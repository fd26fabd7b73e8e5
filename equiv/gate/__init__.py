"""The gate: is this model that one, and if not, what happened to it?"""
