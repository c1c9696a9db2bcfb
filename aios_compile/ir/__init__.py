"""Levels, regions, provenance, the op table, the verifier and the printer."""
