"""The `aios` command. Nothing here imports torch; what is heavy is imported when a command runs."""
