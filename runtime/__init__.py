"""Processes and signals, the command line, files, errors and the Hugging Face hub."""
