"""The checkpoint that a run resumes from, and the checks that it belongs to the same run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from interop.own import checkpoints, find_checkpoint, find_corruption, read_checkpoint
from runtime.errors import UserError, is_first_process
from training.settings import RunSettings

# The entry of a run's config that identifies its features, see `FeatureDataset.fingerprint`.
FINGERPRINT = "data.fingerprint"
# The hash of the weights of their VAE. Earlier versions did not record it.
VAE_FINGERPRINT = "data.vae_fingerprint"
# Options that may differ from those of the checkpoint that a run resumes from. `schedule_steps` checks them.
MAY_DIFFER = ("training.max_steps", "training.schedule_steps")


def check_new(folder: Path):
    """Raise UserError if a folder holds a run."""
    if present := checkpoints(folder / "checkpoints"):
        raise UserError(
            f"{folder} already holds a run, up to {present[0].name}: "
            "use --resume auto to continue it, or another --prefix to start a new one"
        )


def check_interval(folder: Path, interval: list, process: str):
    """Raise UserError if a folder holds the run of an independent expert that has another interval of timesteps.

    A run of another process is left to `read_resume`, because its intervals are not comparable.
    """
    path = folder / "config.json"
    if not (checkpoints(folder / "checkpoints") and path.exists()):
        return
    try:
        config = json.loads(path.read_text())
        trained = config["training"]["timesteps"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove it to resume the run") from None
    if trained != interval and config["diffusion"].get("process") == process:
        raise UserError(
            f"--resume auto: {folder} was trained with the timesteps {trained}, this run asks for {interval}: "
            "use the same --independent and --boundaries, or another --prefix to start new runs"
        )


def check_later(folder: Path, resume: "Resume"):
    """Raise UserError if a folder holds later checkpoints of another schedule, which "auto" would take for this run's.

    The same schedule gives the same checkpoints again.
    """
    for path in checkpoints(folder / "checkpoints"):
        if int(path.stem) <= resume.step:
            break
        # These will be renamed.
        if path in (resume.damaged or {}):
            continue
        try:
            steps = falling_steps(read_checkpoint(path)["config"]["training"])
        # "auto" passes over a damaged checkpoint, too.
        except (UserError, KeyError, TypeError):
            continue
        if steps != falling_steps(resume.config["training"]):
            raise UserError(
                f"--resume {resume.path}: {path} is from a schedule of {steps:,} steps: remove it and the other later "
                "checkpoints, or use another --prefix"
            )


def falling_steps(training: dict) -> int:
    """Return the number of steps over which the schedules of a run fall, from the "training" part of its config."""
    return training["schedule_steps"] or training["max_steps"]


class Resume(NamedTuple):
    """How a run begins.

    Attributes:
        config: the configuration of the run. If it resumes, load_weight and prior_bonus are those of its step 0, and
            schedule_steps is what it goes on with.
        path: the checkpoint to resume from; None for a new run.
        state: its content, mapped into memory; None for a new run.
        damaged: the newer checkpoints that are damaged, each with a description of the damage.
    """

    config: dict
    path: Path | str | None = None
    state: dict | None = None
    damaged: dict[Path, str] | None = None

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return self.state["step"] if self.state else 0


def find_resume(resume: str | None, folder: Path, config: dict, extend: str) -> Resume:
    """Find and read the checkpoint to resume from, and check that it belongs to the same run.

    The whole file is read to compare it with its checksums. Therefore only the first process does this. The others get
    its path later and call `read_resume`.

    Args:
        resume: a checkpoint, or "auto" for the newest undamaged one of the run; None for a new run.
        folder: the run's folder.
        config: configuration of this run.
        extend: what happens to the schedules if a finished run gets more steps: "hold" keeps their final values, and
            "stretch" lets them fall over all steps of the longer run.

    Returns:
        How the run begins; on all processes but the first, as a new run.

    Raises:
        UserError: if the folder holds another run, or the checkpoint has another configuration or an earlier
            version, or cannot be read.
    """
    if not is_first_process():
        return Resume(config)
    present = checkpoints(folder / "checkpoints")
    path, damaged = resume, {}
    if resume == "auto":
        path, damaged = newest_checkpoint(present)
    elif resume:
        path = find_checkpoint(resume)
    if path is None:
        check_new(folder)
        return Resume(config)
    if present and present[0].parent.resolve() != Path(path).resolve().parent:
        raise UserError(f"{folder} already holds a different run from that of --resume {path}: use another --prefix")
    # The newest checkpoint has been compared with its checksums already.
    found = read_resume(path, config, extend, verify=resume != "auto")._replace(damaged=damaged)
    check_later(folder, found)
    return found


def read_resume(path: Path | str, config: dict, extend: str, verify: bool = False) -> Resume:
    """Read the checkpoint to resume from, mapped into memory, and check that it belongs to the same run.

    Args:
        path: the checkpoint.
        config: configuration of this run.
        extend: see `find_resume`.
        verify: compare all parts of the file with their checksums first.

    Raises:
        UserError: see `find_resume`.
    """
    if not Path(path).exists():
        where = "" if is_first_process() else ": all nodes need the same --results-dir on a shared file system"
        raise UserError(f"{path}: no such file{where}")
    state = read_checkpoint(path, verify=verify)
    if not {"config", "step", "model", "ema", "optimizer", "scaler", "window"} <= state.keys():
        raise UserError(f"--resume {path} holds weights but no training state: use it with --load-weight")
    trained, asked = (part["diffusion"]["process"] for part in (state["config"], config))
    if trained != asked:
        raise UserError(f"--resume {path} was trained with --process {trained}, this run asks for {asked}")
    # The initial weights and the prior's bonus have no effect after step 0.
    kept = {name: state["config"]["training"][name] for name in ("load_weight", "prior_bonus")}
    kept["schedule_steps"] = schedule_steps(path, state, config["training"], extend)
    config = config | {"training": config["training"] | kept}
    # Checkpoints of earlier versions have no entries for later settings.
    trained = state["config"] | {"training": asdict(RunSettings()) | state["config"]["training"]}
    before, now = flatten(trained), flatten(config)
    # The fingerprint comes last, because another option that differs says more.
    unknown = {VAE_FINGERPRINT} - (before.keys() & now.keys())
    for key in sorted((before.keys() | now.keys()) - unknown, key=lambda key: (key == FINGERPRINT, key)):
        if before.get(key) != now.get(key) and key not in MAY_DIFFER:
            if key == FINGERPRINT:
                raise UserError(
                    f"--resume {path} was trained on other features: their images, order, labels or draws differ from "
                    "those of --data-path: use the features of that run, or start a new one with another --prefix"
                )
            trained, asked = (
                text if len(text := str(part.get(key))) < 200 else "other values" for part in (before, now)
            )
            raise UserError(
                f"--resume {path} was trained with {key}={trained}, this run asks for {asked}: "
                "use the same settings, or start a new run with --load-weight and another --prefix"
            )
    return Resume(config, path, state)


def schedule_steps(path, state: dict, training: dict, extend: str) -> int | None:
    """Return the schedule_steps of a run that resumes from `state`.

    Args:
        path: the checkpoint, for error messages.
        state: its content.
        training: the "training" part of the run's config.
        extend: see `find_resume`.

    Raises:
        UserError: if the number of steps differs from that of the checkpoint, and the checkpoint is not that of a
            finished run with fewer steps.
    """
    before = state["config"]["training"]
    steps, more_steps = before["max_steps"], training["max_steps"]
    if more_steps == steps:
        return before["schedule_steps"]
    if more_steps < steps or state["step"] < steps:
        raise UserError(
            f"--resume {path} belongs to a run of {steps} steps, this run asks for {more_steps}: "
            "only a finished run can be extended, with more steps"
        )
    return (before["schedule_steps"] or steps) if extend == "hold" else None


def newest_checkpoint(present: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """Return the first undamaged checkpoint of a list, and the damaged ones before it with what is wrong with them.

    Raises:
        UserError: if all of them are damaged.
    """
    damaged = {}
    for path in present:
        reason = find_corruption(path)
        if reason is None:
            return path, damaged
        damaged[path] = reason
    if present:
        folder, reason = present[0].parent, damaged[present[0]]
        raise UserError(f"none of the checkpoints in {folder} is complete ({reason}): remove them to start a new run")
    return None, {}


def flatten(config: dict, prefix: str = "") -> dict:
    """Turn {"a": {"b": 1}} into {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat
