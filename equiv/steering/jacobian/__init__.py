"""Steering fitted to a shift at a later site, through the network between."""
