"""A Triton backend for CPUs that compiles nothing: with TRITON_INTERPRET=1 the interpreter runs the kernels."""
