"""Random programs, compiled and held against eager PyTorch and float64: `aios fuzz`."""
