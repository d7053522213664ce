"""The folders of runs as they were written: configs, metrics.jsonl, pictures, and scores of evaluator.py."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from interop.own import fingerprint
from runtime.errors import UserError, warn
from runtime.files import SETTINGS
from training.scoring import differing_measures

# The numbers of a report that are neither losses nor weights of losses: rates, speed, and the state of the experts.
RATES = ("lr", "coeff_lr")
SPEED = ("images_per_s", "mfu", "memory_gib")
EXPERTS = ("entropy", "expert_spread")
OTHER = ("step", "bad_steps", *RATES, *SPEED, *EXPERTS, "coefficients", "basis_distances")
# A score of one expert, from `training.scoring.HeldOutLoss`.
EXPERT_SCORE = re.compile(r"held_out_loss/expert_(\d+)")


@dataclass(frozen=True)
class Evaluation:
    """The scores of one folder of samples, from a JSON file of evaluator.py.

    Attributes:
        samples: name of the folder of samples.
        step: step of the checkpoint that the samples are from; None if the name of its file is no step.
        scores: the scores by name; None for a score that was not computed.
    """

    samples: str
    step: int | None
    scores: dict[str, float | None]


@dataclass(frozen=True)
class RunRecord:
    """What a run has written to its folder so far.

    Attributes:
        folder: the folder.
        name: name of the run, which no other run of the same page has.
        config: its config.json.
        reports: the reports of metrics.jsonl, in the order of their steps.
        scores: its scored steps, likewise.
        evaluations: scores of samples of its checkpoints.
    """

    folder: Path
    name: str
    config: dict
    reports: list[dict]
    scores: list[dict]
    evaluations: list[Evaluation]

    @property
    def last_step(self) -> int:
        """The last step that the run has logged."""
        return max(line["step"] for line in (*self.reports, *self.scores))

    @property
    def boundaries(self) -> list[float] | None:
        """The noise levels between the experts' intervals; None for a plain model."""
        mixing = self.config["model"]["remix"]
        return mixing and mixing["boundaries"]

    def losses(self) -> list[str]:
        """Return the names of the losses in the reports, in their order."""
        names = dict.fromkeys(name for line in self.reports for name in line)
        return [name for name in names if name not in OTHER and not name.endswith("_weight")]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and the finite values of a number in the reports or the scores; of a list, the mean."""
        pairs = [
            (line["step"], mean(line[name])) for line in (*self.reports, *self.scores) if line.get(name) is not None
        ]
        pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def samples(self) -> dict[int, Path]:
        """Return the pictures of samples by step."""
        files = (self.folder / "samples").glob("*.png")
        return {int(path.stem): path for path in sorted(files) if path.stem.isdigit()}

    @staticmethod
    def expert_errors(line: dict) -> dict[int, float]:
        """Return the held-out loss of each expert in a line of scores, by the expert's index."""
        found = ((EXPERT_SCORE.fullmatch(name), value) for name, value in line.items())
        return {int(match[1]): value for match, value in found if match}


def mean(value: float | list) -> float:
    """Return a number, or the mean of a list of numbers."""
    return sum(value) / len(value) if isinstance(value, list) else value


def read_runs(folders: Iterable[str], score_files: Iterable[str] = ()) -> list[RunRecord]:
    """Read what runs have written.

    Args:
        folders: the folders of the runs.
        score_files: JSON files of evaluator.py (--json), with scores of samples of these runs.

    Raises:
        UserError: if a folder or a file cannot be read, or if a file does not say whose samples it scores.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(f"{paths[i]} is given twice")
    found: dict[Path, list[Evaluation]] = {path: [] for path in resolved}
    for file in score_files:
        for run, evaluation in read_scores(Path(file)):
            if run in found:
                found[run].append(evaluation)
            else:
                warn(f"{file}: {evaluation.samples} has samples of {run}, which is none of the runs: left out")
    runs = [
        RunRecord(path, name, *read_folder(path), evaluations=found[place])
        for path, place, name in zip(paths, resolved, short_names(resolved), strict=True)
    ]
    for run in runs[1:]:
        for flag, first, other in differing_measures(*(part.config.get("flags", {}) for part in (runs[0], run))):
            warn(f"{runs[0].name} was scored with {flag} {first}, {run.name} with {other}: do not compare these scores")
    return runs


def short_names(paths: list[Path]) -> list[str]:
    """Return the names of folders, with as many parent folders as tell them apart."""
    for n_parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-n_parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_folder(folder: Path) -> tuple[dict, list[dict], list[dict]]:
    """Return the config, the reports and the scores in a run's folder.

    Raises:
        UserError: if the folder holds no run, or one of its files is empty or damaged.
    """
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    for path in (config, metrics):
        if not path.is_file():
            raise UserError(f"{path}: no such file: {folder} is not the folder of a run")
    try:
        content = json.loads(config.read_text())
        content["model"]["remix"], content["training"]["max_steps"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config} is not the config of a run") from None
    lines = []
    for line in metrics.read_text().splitlines(keepends=True):
        # A run that is still training may have written a part of its last line.
        if line.endswith("\n"):
            try:
                lines.append(dict(json.loads(line)))
                lines[-1]["step"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{metrics}, line {len(lines) + 1} is damaged: {line[:40]!r}") from None
    if not lines:
        raise UserError(f"{metrics} is empty: the run has not logged yet")
    reports = [line for line in lines if "images_per_s" in line]
    return content, reports, [line for line in lines if "images_per_s" not in line]


def read_scores(path: Path) -> list[tuple[Path, Evaluation]]:
    """Return the scores in a JSON file of evaluator.py, with the folder of the run that the samples are from.

    The file lists scores by the path of the samples, or is that of one folder of samples and lies in it.

    Raises:
        UserError: if it is no file of evaluator.py, or the settings.json of the samples is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
        flat = not any(isinstance(value, dict) for value in content.values())
        entries = {str(path.parent): content} if flat else content
        rows = [(Path(samples), dict(scores)) for samples, scores in entries.items()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is not a file of evaluator.py --json") from None
    results = []
    for samples, scores in rows:
        settings = next((place / SETTINGS for place in (samples, samples.parent) if (place / SETTINGS).is_file()), None)
        if settings is None:
            where = "beside it" if flat else f"in {samples.parent}"
            raise UserError(
                f"{path}: there is no {SETTINGS} of sample_ddp.py {where}, which says whose samples were scored"
                + (": use evaluator.py --json samples/NAME/scores.json" if flat else "")
            )
        try:
            record = json.loads(settings.read_text())
            ckpt, [sampled] = Path(record["ckpt"][0]).resolve(), record.get("ckpt_fingerprint", [None])[:1]
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{settings} is not a file of sample_ddp.py") from None
        # A run that was started again with the same name has written other checkpoints.
        if sampled and ckpt.is_file() and fingerprint(ckpt) != sampled:
            warn(f"{path}: {ckpt} has changed since {settings.parent} was sampled: left out")
            continue
        step = int(ckpt.stem) if ckpt.stem.isdigit() else None
        results.append((ckpt.parent.parent, Evaluation(settings.parent.name, step, scores)))
    return results
