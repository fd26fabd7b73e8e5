"""Steering in a file of its own."""
