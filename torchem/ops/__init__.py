"""The hot operations, one file each: documentation, argument checks, the PyTorch reference, the choice of backend."""
