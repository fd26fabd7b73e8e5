"""Steering as a weight edit and back, where it is one."""
