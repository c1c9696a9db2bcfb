"""Tests of serving with the example checkpoints: asyncio, speculation, the engine in its own process."""
