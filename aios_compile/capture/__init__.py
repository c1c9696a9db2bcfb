"""Capture a module as level 1, with regions, provenance and bound weights."""
