"""The Triton target, in its first form: pointwise and row reductions from the C++ specs."""
