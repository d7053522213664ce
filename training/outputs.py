"""What a run writes: metrics, snapshots, checkpoints, pictures and scores."""

import logging
from functools import cache, partial

from runtime.processes import StopSignal
from training.loggers import MetricLogger
from training.previews import SamplePreview
from training.run import Inputs, Run
from training.statistics import ThroughputTimer, matmul_rate, report_line
from training.trainer import Trainer, save_checkpoint
from training.writer import CheckpointWriter

# Runs that follow each other in one process, such as independent experts, share the measurement.
peak_rate = cache(matmul_rate)


class Outputs:
    """Writes what a run's flags ask for. Every process must call the same methods at the same steps.

    Args:
        run: the run.
        inputs: what it reads.
        trainer: its training state.
        loggers: log the metrics.
        log: the run's logger.

    Attributes:
        run, trainer, log: the arguments.
        timer: measures the speed of training, without the time of everything that is written here.
        writer: writes the checkpoints.
        scorer: what scores the run; None if nothing does.
    """

    def __init__(self, run: Run, inputs: Inputs, trainer: Trainer, loggers: MetricLogger, log: logging.Logger):
        args, world = run.args, trainer.world
        self.run = run
        self.trainer = trainer
        self.loggers = loggers
        self.log = log
        self.scorer = inputs.scorer
        self.writer = CheckpointWriter(run.folder / "checkpoints", log, run.retention)
        peak_flops_per_s = peak_rate(world.device, run.settings.precision) * world.size
        self.timer = ThroughputTimer(world.device, trainer.experts.training_flops(), peak_flops_per_s)
        self.picture_s = 0.0  # the time of the latest pictures
        self.previews = None
        if args.sample_every and world.is_main:
            self.previews = SamplePreview(
                run.folder,
                args.model,
                run.settings.global_seed,
                run.dataset.classes,
                inputs.decoder,
                run.process if run.can_sample else None,
                partial(world.autocast, run.settings.precision),
                world.device,
                log,
            )

    def start_scorer(self, step: int, stop: StopSignal) -> bool:
        """Prepare the scores, and score step 0 or the step that a run was stopped in. Return whether it was stopped."""
        if self.scorer is None:
            return False
        with self.timer.paused():
            self.scorer.start(self.run.folder, step, self.trainer.world, stop, self.loggers, self.log)
            return self.scorer.is_due(step) and not self.scorer.score(step, self.trainer.whole_ema(True))

    def report(self, step: int):
        """Log the metrics since the last report."""
        settings = self.run.settings
        losses, nonfinite = self.trainer.stats.read()
        performance = self.timer.read()
        # All processes call this: with sharded bases, each has only some rows, and the distances need all.
        numbers = losses | {"bad_steps": int(nonfinite.count)} | self.trainer.schedule() | performance
        metrics = {"step": step} | numbers | self.trainer.experts.metrics()
        if self.trainer.world.is_main:
            self.loggers.log_metrics(step, metrics)
            line = report_line(metrics, settings.max_steps, settings.global_batch_size, self._remaining_s(step))
            self.log.info(line)

    def _remaining_s(self, step: int) -> float:
        """Return the seconds that the remaining pictures and scores will take."""
        every = self.run.args.sample_every
        pictures = self.run.settings.max_steps // every - step // every if self.previews else 0
        return pictures * self.picture_s + (self.scorer.remaining_s(step) if self.scorer else 0)

    def snapshot(self, step: int):
        """Write a snapshot for post-hoc EMA."""
        with self.timer.paused():
            averages = self.trainer.whole_averages()
            if self.trainer.world.is_main:
                self.writer.save_snapshot(step, averages, self.run.args.ema_snapshot_dtype)

    def checkpoint(self, step: int):
        """Write a checkpoint."""
        with self.timer.paused():
            save_checkpoint(self.writer, self.trainer, self.run.config, step)

    def draw(self, step: int):
        """Draw samples and coefficients. Only rank 0 does; the other processes wait for it in their next step."""
        with self.timer.paused():
            ema = self.trainer.whole_ema()
            for kind, path in self.previews.draw(step, ema).items() if self.previews else ():
                self.loggers.log_image(step, kind, path)
        self.picture_s = self.timer.last_pause

    def is_score_due(self, step: int) -> bool:
        """Return whether a step is to be scored."""
        return self.scorer is not None and self.scorer.is_due(step)

    def score(self, step: int) -> bool:
        """Score the EMA weights. Returns whether that came to its end: False if a process was asked to stop."""
        with self.timer.paused():
            return self.scorer.score(step, self.trainer.whole_ema(True))
