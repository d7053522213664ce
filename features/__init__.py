"""Encoded images: their format on disk, the autoencoders that make them, and the images that they come from."""
