"""The scores of evaluator.py: the scores, the feature networks, files of images and statistics."""
