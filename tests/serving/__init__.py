"""Serving the example checkpoints: asyncio, speculation, the engine in its own process."""
