"""Alignment of images in two dimensions: multi-reference and reference-free."""
