"""Train a DiT or a RemixDiT on encoded features.

    torchrun --nnodes=1 --nproc_per_node=8 train_fast.py --model RemixDiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt \\
        --data-path data/imagenet_encoded --epochs 20 --prefix RemixDiT-S-4-20-100K --n-basis 4 --n-experts 20

The run's folder is outputs/<prefix>/. It holds config.json, log.txt, metrics.jsonl, checkpoints/<step>.pt, and the
pictures samples/<step>.png and coefficients/<step>.png. The images, timesteps, experts and noise of a step depend only
on the seed, the step and the position in the global batch. They depend neither on the device, nor on the number of
processes, nor on when the run was resumed.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch

from runtime.command_line import run_script
from runtime.processes import StopSignal, restore_signals, setup, use_deterministic_algorithms
from training.batches import BatchSampler, StepBatch
from training.dry_run import dry_run
from training.flags import make_parser
from training.outputs import Outputs
from training.resolve import independent_runs
from training.resume import find_resume, read_resume
from training.run import lock_run, make_batch_sampler, open_folder, plan_run, read_inputs
from training.statistics import explain_failure
from training.trainer import Trainer

# With several processes, the decision to stop is exchanged every STOP_CHECK steps only, because in the exchange each
# process waits for all others.
STOP_CHECK = 4


class End(NamedTuple):
    """How the loop ended: after which step, and whether too many losses were not finite or the run was stopped."""

    step: int
    failed: bool
    stopped: bool


def main(args: argparse.Namespace):
    """Train a model, or several independent experts one after the other, as the flags say."""
    for expert in independent_runs(args):
        if not train(expert):
            break


def train(args: argparse.Namespace) -> bool:
    """Train one model, and return whether it was trained for all its steps."""
    # Check all input, build the model and read the checkpoint, before any device or process group is used.
    run = plan_run(args)
    if args.dry_run:
        print("\n".join(dry_run(run)))
        return False
    lock_run(run.folder)
    resume = find_resume(args.resume, run.folder, run.config, args.extend)
    inputs = read_inputs(run, resume.step)

    # Join the other processes, and prepare the run's folder.
    if args.deterministic:
        use_deterministic_algorithms()
    world = setup()
    stop = StopSignal()
    # Only rank 0 has searched for the checkpoint and verified its checksums. The others now read the same file.
    path = world.from_main(resume.path)
    if path and not world.is_main:
        resume = read_resume(path, run.config, args.extend)
    run = run.resumed(resume.config)
    log, loggers = open_folder(run, inputs, resume, world)

    # Set up the training state.
    trainer = Trainer(run.model, run.process, world, run.settings, run.execution)
    if resume.state:
        trainer.load_state_dict(resume.state, path)
        log.info(f"resumed from {path}")
    step = resume.step
    del resume
    sampler = make_batch_sampler(run.settings, trainer.experts, run.process, world, args.grad_accum)
    outputs = Outputs(run, inputs, trainer, loggers, log)
    # A run that was stopped while it scored a step scores it now.
    stopped = outputs.start_scorer(step, stop)

    # Train, wait until the last checkpoint is written, and report how the run ended.
    end = End(step, failed=False, stopped=stopped)
    with closing(loggers), sampler.load(run.dataset, range(step, run.settings.max_steps), args.num_workers) as batches:
        if not stopped:
            end = loop(outputs, sampler, batches, step, stop)
    outputs.writer.wait()
    restore_signals()
    if run.execution.compile:
        # The compiler limits how often it compiles the same code for another model.
        torch.compiler.reset()
    return report_end(outputs, sampler, end, stop)


def loop(outputs: Outputs, sampler: BatchSampler, batches: Iterator[StepBatch], step: int, stop: StopSignal) -> End:
    """Train until the last step, a stop signal, or too many steps whose loss is not finite.

    Args:
        outputs: what the run writes, and the training state.
        sampler: divides the batches into microbatches.
        batches: one batch per step.
        step: number of steps that are done.
        stop: the stop signal of this process.
    """
    run, trainer, world = outputs.run, outputs.trainer, outputs.trainer.world
    args, settings = run.args, run.settings
    finished = failed = stopped = False
    while not (step == settings.max_steps or failed or stopped):
        trainer.set_schedule(step)
        trainer.step(step, sampler.microbatches(next(batches)))
        outputs.timer.add(settings.global_batch_size)
        step += 1

        # Decide together with the other processes whether this was the last step. Then `finished`, `failed` and
        # `stopped` are the same on all processes, so all of them take the same branches below.
        finished = step == settings.max_steps
        if world.size == 1 or step % STOP_CHECK == 0 or finished:
            streak = trainer.stats.longest_streak()
            failed, stopped = world.any(streak >= args.max_bad_steps, stop.requested is not None)
            stopped = stopped and not (failed or finished)

        if step % args.log_every == 0 or finished:
            outputs.report(step)
        # The snapshot of a step is written before its checkpoint. A run that resumes from that checkpoint does not
        # write the snapshot again.
        if args.ema_snapshots and (step % args.ema_snapshots == 0 or finished):
            outputs.snapshot(step)
        saved = step % args.ckpt_every == 0 or finished or stopped
        if saved:
            outputs.checkpoint(step)
        if args.sample_every and step % args.sample_every == 0:
            outputs.draw(step)
        if outputs.is_score_due(step) and not (failed or stopped):
            stopped = not outputs.score(step)
            if stopped and not saved:
                outputs.checkpoint(step)
    return End(step, failed, stopped)


def report_end(outputs: Outputs, sampler: BatchSampler, end: End, stop: StopSignal) -> bool:
    """Log how a run ended, and return whether it was trained for all its steps.

    Raises:
        SystemExit: with code 1, if too many losses were not finite, or if the last checkpoint was not written.
    """
    log, trainer = outputs.log, outputs.trainer
    if end.failed:
        _, nonfinite = trainer.stats.read()
        if trainer.world.is_main:
            log.error(explain_failure(nonfinite, sampler, trainer.experts))
        raise SystemExit(1)
    # Only rank 0 writes. The other processes do not wait for its last checkpoint.
    if outputs.writer.failed:
        log.error(
            f"the run ends after step {end.step:,} without a checkpoint of this step: free disk space, then --resume "
            "auto repeats the steps after the last good checkpoint"
        )
        raise SystemExit(1)
    if end.stopped:
        cause = stop.requested or "another process"
        log.info(f"stopped by {cause} after step {end.step:,}; --resume auto continues the run")
    else:
        log.info("done")
    return not end.stopped


if __name__ == "__main__":
    run_script(main, make_parser())
