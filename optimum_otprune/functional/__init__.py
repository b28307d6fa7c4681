"""Tensors in, tensors out: the mathematics of the package, without models, devices or files."""
