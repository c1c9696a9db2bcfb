"""The runtime, torch-free: admission, scheduler, paged KV cache, batches, engine, executor."""
