"""Kernels for the CPU: one C++ file, compiled on this machine when first needed."""
