"""Checkpoint folders: files, safetensors, tokenizer, chat template. Free of torch."""
