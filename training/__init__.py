"""Training: one step, what is drawn for it, statistics, previews, loggers and the dry run."""
