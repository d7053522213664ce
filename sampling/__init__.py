"""What a checkpoint needs to sample: experts one at a time, guidance, and the images of given sample numbers."""
