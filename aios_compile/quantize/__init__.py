"""Quantise a checkpoint offline with calibration text: GPTQ and AWQ, written as a model folder."""
