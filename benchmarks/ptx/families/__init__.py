"""A family of kernels each: launched through the library, compared with the reference."""
