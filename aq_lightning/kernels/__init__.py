"""Bit layouts and device kernels; the only package that may import triton."""
