"""The C++ implementations for CPUs, reached through one shared library without a torch ABI."""
