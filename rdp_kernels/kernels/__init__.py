"""What computes: the eager reference, the Triton kernels, the compiled library, and the autograd function over them."""
