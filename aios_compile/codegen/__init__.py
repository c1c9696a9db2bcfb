"""Specs and emitters, the program, the build, and the artefact cache."""
