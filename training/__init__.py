"""The parts of training: start of a run, random draws, one step, statistics, previews, loggers, dry run."""
