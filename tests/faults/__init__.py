"""Faults over a longer time: kills and load."""
