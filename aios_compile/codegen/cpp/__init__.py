"""The C++ target: emitters, the dialect, the headers of generated kernels, the builder."""
