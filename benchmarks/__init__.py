"""Measurements: each prints a table and ends in one JSON line of its figures."""
