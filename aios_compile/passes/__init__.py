"""The pipeline, its runner, and one pass a file."""
