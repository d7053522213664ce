"""The flags of train_fast.py: the dozen that a first run needs, then the others by topic.

A run records its flags in its config.json, which is a valid argument of --config.
"""

import argparse
import json
import sys
from pathlib import Path

from diffusion import PROCESSES
from diffusion.flow import PREDICTIONS, WEIGHTS
from diffusion.interpolants import PATHS, TIME_SAMPLINGS
from diffusion.intervals import TIMESTEPS
from evaluation.scores import NEIGHBOURS
from features.statistics import LATENT_STATS_FLAG
from interop.shapes import TIMESTEP_FREQUENCIES_FLAG, TRUST_PICKLE_FLAG
from mixing.options import MIXERS, SCOPES
from models import model_names
from runtime.command_line import ArgumentParser, flags, folder_name, number, positive_int, seed_int
from runtime.processes import PRECISIONS
from training.loggers import logger_names
from training.posthoc_ema import SNAPSHOT_DTYPES
from training.resolve import RECIPES
from training.scoring import FID_SAMPLES
from training.settings import LR_SCHEDULES, RunSettings

# What a run's config.json does not record: the run's name, how it was started, and whether its files are trusted.
NOT_RECORDED = ("config", "prefix", "resume", "extend", "dry_run", "trust_pickle")


def level_argument(text: str) -> float:
    """Convert a string to a noise level, as an argparse type; whole numbers become integers."""
    value = number(float, 0, TIMESTEPS)(text)
    return int(value) if value.is_integer() else value


class TrainingParser(ArgumentParser):
    """The parser of train_fast.py, which reads the flags of another run from --config."""

    def parse_args(self, words: list[str] | None = None) -> argparse.Namespace:
        """Parse the command line. The attribute `recorded` of the result is what config.json records."""
        words = sys.argv[1:] if words is None else words
        first = ArgumentParser(add_help=False, prog=self.prog)
        first.add_argument("--config")
        path = first.parse_known_args(words)[0].config
        # Of two equal flags, the later one counts.
        args = super().parse_args([*(self._read_config(path, words) if path else []), *words])
        args.process = args.process or RECIPES[args.recipe].get("process", next(iter(PROCESSES)))
        args.recorded = {
            name: value for name, value in vars(args).items() if value is not None and name not in NOT_RECORDED
        }
        return args

    def _read_config(self, path: str, words: list[str]) -> list[str]:
        """Return the flags that a config.json records, as words of the command line."""
        try:
            recorded = dict(json.loads(Path(path).read_text())["flags"])
        except OSError as error:
            self.error(f"--config {path}: {error.strerror}")
        except (ValueError, KeyError, TypeError):
            self.error(f"--config {path} is not the config.json of a run")
        if any(word.split("=")[0] == "--epochs" for word in words):
            recorded.pop("max_steps", None)
        names = {action.dest: action.option_strings for action in self._actions}
        for name, value in list(recorded.items()):
            if name not in names:
                self.error(f"--config {path} holds {name}, which is not a flag")
            if name in ("help", *NOT_RECORDED):
                self.error(f"--config {path} holds {name}, which a run does not record")
            if value is False and len(names[name]) == 1:
                # The flag has no negative form: it is left out.
                del recorded[name]
        long_names = {next(iter(names[name])).removeprefix("--"): value for name, value in recorded.items()}
        return flags(**long_names)


def make_parser() -> TrainingParser:
    """Return the parser of the flags."""
    parser = TrainingParser(description="Train a DiT or a RemixDiT on features from extract_features.py.")
    for add_flags in (
        add_first_run_flags,
        add_run_flags,
        add_model_flags,
        add_process_flags,
        add_training_flags,
        add_optimizer_flags,
        add_speed_flags,
        add_report_flags,
        add_score_flags,
    ):
        add_flags(parser)
    return parser


def add_first_run_flags(parser: ArgumentParser):
    """Add the flags of the group "first run" of --help."""
    add = parser.add_argument_group("first run", "What a first run needs.").add_argument
    add(
        "--data-path",
        required=True,
        metavar="FOLDER",
        help="features of extract_features.py, those that LightningDiT has published, or the original layout",
    )
    add(
        "--model",
        choices=model_names(),
        default="RemixDiT-S/2",
        metavar="NAME",
        help="DiT, LightningDiT or DiTDH, with Remix before it for a model with experts, then the size and the patch "
        "size, such as DiT-T/2 or RemixLightningDiT-XL/1",
    )
    add(
        "--load-weight",
        metavar="PATH",
        help="initial weights: a checkpoint of this project (a run's folder stands for its newest one), of "
        "facebookresearch/DiT, SiT, REPA, LightningDiT, RAE or the original Remix-DiT, hf:OWNER/REPOSITORY/FILE for "
        "one on the Hugging Face hub, or a DiT in diffusers' layout (a folder, or a hub name such as "
        "facebook/DiT-XL-2-256) (default: random weights)",
    )
    add("--n-basis", type=positive_int, default=4, metavar="K", help="number of basis models")
    add("--n-experts", type=number(int, 1, TIMESTEPS), default=20, metavar="N", help="number of experts")
    add(
        "--epochs",
        type=positive_int,
        default=20,
        help="passes over the images; 20 passes over ImageNet are the published 100,000 steps",
    )
    add(
        "--global-batch-size",
        type=positive_int,
        default=RunSettings.global_batch_size,
        metavar="IMAGES",
        help="images per step, on all processes together",
    )
    add(
        "--lr",
        type=number(float, 0, above=True),
        help="peak learning rate of the bases and shared weights; it falls to half of it by a cosine over the run "
        "(default: the published 2e-5 with --load-weight, otherwise DiT's 1e-4)",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="precision of the matrix products; fp32 is TF32 on GPUs (default: bf16 on GPUs, fp32 on CPUs)",
    )
    add("--prefix", type=folder_name, metavar="NAME", help="name of the run's folder (default: from the model's name)")
    add(
        "--resume",
        metavar="PATH|auto",
        help="checkpoint to resume from; auto: the newest undamaged one of this run, or a new run if there is none",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the run's size, disk space, FLOPs, bytes sent, measured speeds and an estimate of its memory, and "
        "end; needs neither GPUs nor data; the environment variable WORLD_SIZE sets the number of GPUs",
    )


def add_run_flags(parser: ArgumentParser):
    """Add the flags of the group "run" of --help."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--config",
        metavar="FILE",
        help="config.json of another run: start with its settings; flags on the command line replace them",
    )
    add("--results-dir", default="outputs", metavar="FOLDER", help="folder that holds the runs' folders")
    add(
        "--extend",
        choices=["hold", "stretch"],
        default="hold",
        help="with --resume, if a finished run gets more steps: hold the final learning rates, or stretch the schedule "
        "over all steps",
    )
    add(
        "--global-seed", type=seed_int, default=RunSettings.global_seed, metavar="SEED", help="seed of all random draws"
    )
    add("--max-steps", type=positive_int, metavar="STEPS", help="number of steps, instead of --epochs")
    add("--ckpt-every", type=positive_int, default=10_000, metavar="STEPS", help="steps between checkpoints")
    add("--keep", type=positive_int, metavar="N", help="number of recent checkpoints to keep (default: all)")
    add("--keep-every", type=positive_int, metavar="STEPS", help="with --keep: also keep every multiple of STEPS")
    add(
        "--max-bad-steps",
        type=positive_int,
        default=10,
        metavar="STEPS",
        help="consecutive steps with a non-finite loss or gradient after which the run ends",
    )
    add("--trust-pickle", **TRUST_PICKLE_FLAG)
    add("--strict", action="store_true", help="no effect: --load-weight must always fit (a flag of the original)")


def add_model_flags(parser: ArgumentParser):
    """Add the flags of the group "model" of --help."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--new-classes",
        action=argparse.BooleanOptionalAction,
        help="let --load-weight be a model of other classes: the class embeddings are initialized again, except those "
        "of the null class and of classes whose names occur in both the model and the features",
    )
    add("--timestep-frequencies", **TIMESTEP_FREQUENCIES_FLAG)
    add(
        "--latent-stats",
        **LATENT_STATS_FLAG
        | dict(
            help=LATENT_STATS_FLAG["help"] + "; for published features, which are not normalized (default: "
            "latents_stats.pt in the folder of the features)"
        ),
    )
    add("--image-size", type=positive_int, metavar="PIXELS", help="side of the images, which the features must have")
    add("--num-classes", type=positive_int, metavar="N", help="number of classes (default: the features', or 1000)")
    add(
        "--boundaries",
        type=level_argument,
        nargs="+",
        metavar="LEVEL",
        help="N + 1 increasing noise levels that bound the intervals of a RemixDiT's experts, or of --independent "
        "experts: timesteps from 0 to 1000, or from 0 to 1 for flows. Experts are trained equally often: boundaries "
        "other than the default change the density of the training times (default: intervals of equal probability)",
    )
    add(
        "--mixer",
        choices=MIXERS,
        default="softmax",
        help="coefficients: softmax of the logits, the logits themselves (raw), or one-hot",
    )
    add(
        "--mixer-scope",
        choices=SCOPES,
        default="global",
        help="global: one set of coefficients for all blocks; local: one per block",
    )
    add(
        "--rank",
        type=positive_int,
        metavar="R",
        help="low-rank bases: one DiT, and K pairs of matrices of rank R for each mixed layer, as in LoRA (default: "
        "every basis is a whole layer)",
    )
    add(
        "--freeze",
        action=argparse.BooleanOptionalAction,
        help="train only the bases and the coefficients, not what the experts share",
    )
    add("--mix-modulation", action=argparse.BooleanOptionalAction, help="also mix the adaLN layer of each block")
    add(
        "--timesteps",
        type=level_argument,
        nargs=2,
        metavar=("LO", "HI"),
        help="train a plain DiT on the timesteps LO to HI - 1 only, or on a flow's noise levels LO to HI, as one of "
        "several independent experts (default: all)",
    )
    add(
        "--independent",
        type=number(int, 2, TIMESTEPS),
        metavar="N",
        help="train N plain DiTs one after the other, on the noise levels that a RemixDiT's N experts would have (see "
        "--boundaries); --max-steps is the total, each trains for an N-th of it; their folders are <prefix>-0, "
        "<prefix>-1, ...",
    )


def add_process_flags(parser: ArgumentParser):
    """Add the flags of the group "process" of --help."""
    add = parser.add_argument_group("process").add_argument
    add(
        "--process",
        choices=PROCESSES,
        help="Gaussian diffusion, or flow matching (default: gaussian, or flow with a --recipe that is one's)",
    )
    add(
        "--min-snr",
        type=number(float, 0, above=True),
        metavar="GAMMA",
        help="multiply the squared error of the noise by min(SNR, GAMMA) / SNR, which is small for low noise "
        "(arXiv 2303.09556; default: no weight)",
    )
    add(
        "--min-weight",
        type=number(float, 0, 1),
        metavar="W",
        help="lower bound of the factor of --min-snr (default: 0)",
    )
    add("--path", choices=PATHS, help="path of a flow between noise and data (default: linear)")
    add("--prediction", choices=PREDICTIONS, help="what the model of a flow predicts (default: velocity)")
    add("--weight", choices=WEIGHTS, help="loss weight of a noise or score prediction (default: none)")
    add("--time-sampling", choices=TIME_SAMPLINGS, help="distribution of a flow's noise levels (default: uniform)")
    add(
        "--time-mean",
        type=number(float),
        metavar="MEAN",
        help="mean of logit(u) for logit-normal noise levels u, before --time-shift (default: 0)",
    )
    add("--time-std", type=number(float, 0, above=True), metavar="STD", help="std of logit(u) (default: 1)")
    add(
        "--time-shift",
        type=number(float, 0, above=True),
        dest="shift",
        metavar="S",
        help="move a flow's noise levels u to S u / (1 + (S - 1) u), in training and in sampling (default: 1, or with "
        "--recipe rae the square root of the numbers in a sample / 4096)",
    )
    add(
        "--time-max",
        type=number(float, 0, 1, above=True),
        metavar="U",
        help="highest noise level of a flow's training, before --time-shift (default: 1, or 0.999 with --recipe rae)",
    )
    add(
        "--cosine-weight",
        type=number(float, 0),
        metavar="W",
        help="weight of 1 minus the cosine similarity, over the channels, of a flow's predicted velocity and its "
        "target (arXiv 2501.01423; default: 0, or 1 with --recipe lightningdit)",
    )


def add_training_flags(parser: ArgumentParser):
    """Add the flags of the group "training" of --help."""
    add = parser.add_argument_group("training").add_argument
    add(
        "--recipe",
        choices=RECIPES,
        default="default",
        help="settings where no flag gives others. paper: those of Remix-DiT: 8 experts per batch, mixing logits with "
        "a rate from 1e-2 to 1e-5, and a prior with bonus 3 and weight 1e-4; the published --lr is the default. "
        "lightningdit: a flow with logit-normal noise levels, --cosine-weight 1 and --beta2 0.95 (arXiv 2501.01423). "
        "rae: a flow with --time-max 0.999 and the --time-shift of the latents' dimension (arXiv 2510.11690)",
    )
    add("--grad-accum", type=positive_int, default=1, metavar="N", help="microbatches per step on each process")
    add(
        "--experts-per-batch",
        type=positive_int,
        metavar="E",
        help="experts per global batch, each on an equal part of it; with 1, all images of a step have timesteps of "
        "one interval (default: the largest divisor of the batch size that is at most 16 and N)",
    )
    add(
        "--coeff-lr",
        type=number(float, 0),
        metavar="LR",
        help=f"peak learning rate of the mixing logits (default: {RECIPES['default']['coeff_lr']:g})",
    )
    add(
        "--coeff-lr-end",
        type=number(float, 0),
        metavar="LR",
        help="final learning rate of the mixing logits, to which theirs falls by a cosine (default: half of --lr, as "
        "published, but not above --coeff-lr)",
    )
    add(
        "--prior-strength",
        type=number(float, 0),
        metavar="WEIGHT",
        help="weight of the prior's cross-entropy at step 0; it falls linearly to 0 "
        f"(default: {RECIPES['default']['prior_strength']:g})",
    )
    add(
        "--prior-bonus",
        type=number(float, 0),
        metavar="BONUS",
        help="number added to the initial logit of each expert's basis in the prior, which is floor(i K / N); a "
        f"resumed run keeps its own (default: {RECIPES['default']['prior_bonus']:g})",
    )
    add(
        "--ema-decay",
        type=number(float, 0, 1),
        default=RunSettings.ema_decay,
        metavar="DECAY",
        help="EMA decay per step",
    )
    add(
        "--ema-snapshots",
        type=positive_int,
        metavar="STEPS",
        help="track two more averages for post-hoc EMA (arXiv 2312.02696), and store them in the run's folder ema/ at "
        "this interval; from them, convert.py --ema-std makes an EMA of any width (default: none)",
    )
    add("--ema-snapshot-dtype", choices=SNAPSHOT_DTYPES, default="float16", help="type of the numbers in the snapshots")


def add_optimizer_flags(parser: ArgumentParser):
    """Add the flags of the group "optimizer" of --help."""
    add = parser.add_argument_group(
        "optimizer", "AdamW, whose rates are --lr and --coeff-lr; the defaults are the published settings."
    ).add_argument
    add(
        "--lr-schedule",
        choices=LR_SCHEDULES,
        default=RunSettings.lr_schedule,
        help="cosine: the learning rates fall by a cosine over the run; constant: they stay at their peaks",
    )
    add(
        "--warmup",
        type=number(int, 0),
        default=RunSettings.warmup,
        metavar="STEPS",
        help="steps at the beginning in which the learning rates rise linearly to those of the schedule",
    )
    add(
        "--beta2",
        type=number(float, 0, 1),
        metavar="BETA",
        help=f"decay of the second moments per step (default: {RunSettings.beta2:g}, or "
        f"{RECIPES['lightningdit']['beta2']:g} with --recipe lightningdit)",
    )
    add(
        "--weight-decay",
        type=number(float, 0),
        default=RunSettings.weight_decay,
        metavar="DECAY",
        help="weight decay of all weights but the mixing logits: each step subtracts learning rate x DECAY x weight",
    )
    add(
        "--clip-grad",
        type=number(float, 0),
        default=RunSettings.clip_grad,
        metavar="NORM",
        help="largest gradient norm; 0 for no limit",
    )


def add_speed_flags(parser: ArgumentParser):
    """Add the flags of the group "speed and memory" of --help."""
    add = parser.add_argument_group("speed and memory").add_argument
    add("--compile", action=argparse.BooleanOptionalAction, help="compile model and loss (default: on GPUs only)")
    add(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        help="compute the activations of each block again in the backward pass: less memory, about a third more time",
    )
    add(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="on GPUs, use slower algorithms whose results do not vary from run to run, so that a resumed run can "
        "equal an uninterrupted one bit for bit; on CPUs this is always so",
    )
    add(
        "--shard-bases",
        action=argparse.BooleanOptionalAction,
        help="each process owns a part of every basis, and the processes exchange the mixtures instead of the "
        "gradients of the bases (default: with more than 8 processes, if that sends less)",
    )
    add(
        "--num-workers",
        type=number(int, 0),
        metavar="N",
        help="processes that read features and draw noise, per training process (default: 4, or the number of CPU "
        "cores if there are fewer)",
    )


def add_report_flags(parser: ArgumentParser):
    """Add the flags of the group "reports and pictures" of --help."""
    add = parser.add_argument_group(
        "reports and pictures",
        "In the log, entropy is that of an expert's coefficients in nats, the mean over the experts: 0 if each expert "
        "is one basis, ln K if all bases have equal parts. spread is the distance of the experts' weights from their "
        "mean, relative to the mean: 0 if the experts are equal. docs/runs.md explains all metrics.",
    ).add_argument
    add("--log-every", type=positive_int, default=100, metavar="STEPS", help="steps between reports of the metrics")
    add("--log-to", type=logger_names, metavar="NAMES", help="tensorboard, wandb, or both separated by a comma")
    add(
        "--sample-every",
        type=number(int, 0),
        default=10_000,
        metavar="STEPS",
        help="steps between pictures of samples and coefficients, which take as long as a few steps; 0 for no pictures",
    )
    add(
        "--vae",
        metavar="NAME",
        help="VAE that decodes the samples: ema, mse, a name on the Hugging Face hub or a folder (default: show three "
        "latent channels as colours); recorded with published features, which do not name theirs",
    )


def add_score_flags(parser: ArgumentParser):
    """Add the flags of the group "scores while training" of --help."""
    add = parser.add_argument_group(
        "scores while training",
        "FID, as sample_ddp.py and evaluator.py compute it, and the loss on other images, both of the EMA weights.",
    ).add_argument
    add(
        "--score-every",
        type=positive_int,
        metavar="STEPS",
        help="steps between scores; step 0 and the last are scored too",
    )
    add("--score-against", metavar="PATH", help="reference of FID: an .npz file or a folder, as for evaluator.py")
    add(
        "--score-samples",
        type=number(int, NEIGHBOURS + 1),
        metavar="N",
        help=f"samples for FID (default: {FID_SAMPLES})",
    )
    add("--weights", metavar="PATH", help="feature network, as for evaluator.py (default: Inception, downloaded)")
    add("--held-out", metavar="FOLDER", help="features of other images, for the loss of each expert")
