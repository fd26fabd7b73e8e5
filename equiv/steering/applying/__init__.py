"""Steering added to a running model."""
