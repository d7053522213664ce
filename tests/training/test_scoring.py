"""Scores while training: they equal the scripts' scores and do not change the run; interruptions and wrong input."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PIXELS,
    ToyNetwork,
    assert_same_weights,
    export_network,
    losses,
    make_images,
    run,
    training_flags,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.scoring
from diffusion import create_process
from diffusion.intervals import equal_boundaries
from features.dataset import FeatureDataset, write_index, write_shard
from models import DiT
from remix import RemixDiT
from runtime.errors import UserError
from runtime.files import write_json
from runtime.processes import World
from sampling.loading import load_denoiser
from training.previews import GUIDANCE
from training.scoring import FidScore, ScoreSettings, changed_measures, is_scored, make_scorer, measure_parts, prepare
from training.statistics import HeldOutErrors

# More than one batch of the feature network, and no multiple of a batch of samples.
SAMPLES = 70


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    """Features of other images than those of `features`."""
    folder = tmp_path_factory.mktemp("held-out")
    make_images(folder / "images", seed=1)
    run("extract_features.py", f"--data-path={folder / 'images'}", f"--features-path={folder / 'encoded'}", *PIXELS)
    return folder / "encoded"


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """A folder with a feature network (toy.pt2), images to compare with (ref.npz) and their statistics (stats.npz)."""
    folder = tmp_path_factory.mktemp("reference")
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "ref.npz", arr_0=images)
    weights = f"--weights={export_network(ToyNetwork(), folder / 'toy.pt2')}"
    run("evaluator.py", folder / "ref.npz", weights, "--cache=none", f"--save-stats={folder / 'stats.npz'}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def score_flags(reference: Path, held_out: Path | None, every: int = 2) -> list[str]:
    flags = [f"--score-every={every}", f"--score-samples={SAMPLES}", f"--weights={reference / 'toy.pt2'}"]
    return [*flags, f"--score-against={reference / 'ref.npz'}", *([f"--held-out={held_out}"] if held_out else [])]


def scores(run_folder: Path) -> dict[int, dict]:
    """The logged scores by step; every step is scored once."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if "fid" in line or "held_out_loss" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line.pop("step"): line for line in lines}


def fid_of_the_scripts(ckpt: Path, reference: Path, out: Path, *flags) -> float:
    """The FID that sample_ddp.py and evaluator.py compute for a checkpoint, with the settings of training."""
    sampler, steps = create_process(**load_denoiser([ckpt])[1]["diffusion"]).quick
    sampling = [f"--sampler={sampler}", f"--num-sampling-steps={steps}", f"--cfg-scale={GUIDANCE}", *flags]
    run("sample_ddp.py", f"--ckpt={ckpt}", f"--num-fid-samples={SAMPLES}", *sampling, f"--sample-dir={out}", "--name=s")
    files = [reference / "ref.npz", out / "s/samples.npz", f"--weights={reference / 'toy.pt2'}"]
    run("evaluator.py", *files, "--cache=none", f"--json={out / 'scores.json'}")
    return json.loads((out / "scores.json").read_text())["FID"]


@pytest.fixture(scope="module")
def scored(features, held_out, reference, tmp_path_factory) -> Path:
    """The run `trained` with scores after every second step."""
    path = tmp_path_factory.mktemp("scored")
    flags = [
        *training_flags(features, path, "run"),
        "--max-steps=4",
        "--ckpt-every=2",
        "--log-to=tensorboard",
        "--ema-snapshots=4",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        run("train_fast.py", *flags, *score_flags(reference, held_out))
    return path / "run"


def test_scores_equal_those_of_the_scripts(scored, reference, tmp_path):
    assert scores(scored).keys() == {0, 2, 4}
    for step in (2, 4):
        logged = scores(scored)[step]
        ckpt = scored / f"checkpoints/{step:07d}.pt"
        assert logged["fid"] == fid_of_the_scripts(ckpt, reference, tmp_path / str(step)), "to the last digit"
    assert scores(scored)[2]["fid"] != scores(scored)[4]["fid"]
    log = (scored / "log.txt").read_text()
    assert f"step 0000004/0000004  FID {scores(scored)[4]['fid']:.4f}  held-out loss " in log


def test_held_out_losses_are_those_of_each_expert_at_its_timesteps(scored, held_out):
    model, config = load_denoiser([scored / "checkpoints/0000004.pt"])
    dataset, logged = FeatureDataset(held_out), scores(scored)[4]
    rows = np.random.default_rng(0).permutation(len(dataset))
    x, y = dataset.__getitems__(rows.tolist())
    every, measure = [], HeldOutErrors(create_process(**config["diffusion"]), x, y, len(x))
    for i in range(6):
        times = [t for t in range(2, 1000, 5) if i * 1000 // 6 <= t < (i + 1) * 1000 // 6]
        errors = measure(model.select(i), times).tolist()
        assert logged[f"held_out_loss/expert_{i:02d}"] == pytest.approx(np.mean(errors), rel=1e-5)
        every += errors
    assert logged["held_out_loss"] == pytest.approx(np.mean(every), rel=1e-5)


def held_out_scores(held_out: Path, model: DiT | RemixDiT, process: str, timesteps: list[float]) -> dict[str, float]:
    """The held-out losses of a model that is trained on some noise levels."""
    dataset, diffusion = FeatureDataset(held_out), create_process(process)
    config = {
        "training": {"timesteps": timesteps, "global_seed": 0, "max_steps": 1},
        "model": {"backbone": {"num_classes": 3}},
        "diffusion": {"process": process},
    }
    [score] = make_scorer(ScoreSettings(1, held_out=str(held_out)), dataset, config, model, diffusion).scores
    return score.combine(measure_parts(score, score.parts, prepare(model, torch.device("cpu"))))


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_held_out_losses_of_all_models_can_be_compared(held_out, process):
    """A DiT, a RemixDiT of its copies with any number of experts, and its experts alone: at the same noise levels."""
    torch.manual_seed(0)
    dit = DiT(8, 2, 3, 16, 1, 2, num_classes=3, learn_sigma=process == "gaussian").eval()
    torch.nn.init.normal_(dit.final_layer.linear.weight)
    whole = create_process(process).scale.range
    expected = held_out_scores(held_out, dit, process, whole)
    assert list(expected) == ["held_out_loss"]
    for n_experts in (1, 7, 20, 300):
        boundaries = equal_boundaries(n_experts, whole[1])
        remix = RemixDiT(dit, n_basis=1, n_experts=n_experts, boundaries=boundaries).eval()
        logged = held_out_scores(held_out, remix, process, whole)
        assert logged["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-5)
        assert len(logged) == 1 + min(n_experts, 200)
        for name in list(logged)[1:3]:
            i = int(name.rpartition("_")[2])
            alone = held_out_scores(held_out, dit, process, boundaries[i : i + 2])
            assert alone == {"held_out_loss": pytest.approx(logged[name], rel=1e-5)}
    # Timestep 3 and the levels around 0.0035 are not among those of the grid.
    low, high = {"gaussian": [3, 4], "flow": [0.003, 0.004]}[process]
    [score] = held_out_scores(held_out, dit, process, [low, high]).values()
    assert np.isfinite(score)


def test_the_figure_of_ema_widths_has_the_fid_of_training(scored, reference, tmp_path):
    flags = [f"--score-against={reference / 'ref.npz'}", f"--weights={reference / 'toy.pt2'}", "--stds=0.1"]
    out = tmp_path / "ema.png"
    run("visualize.py", "ema", scored, *flags, f"--score-samples={SAMPLES}", f"--out={out}")
    header, training, other = (line.split(",") for line in out.with_suffix(".csv").read_text().splitlines())
    assert header == ["std", "FID"]
    assert training == ["training", str(scores(scored)[4]["fid"])]
    assert other[0] == "0.1"
    assert float(other[1]) != float(training[1])


def test_scoring_does_not_change_the_run(scored, trained):
    assert losses(scored) == losses(trained), "bit for bit"
    assert_same_weights(scored / "checkpoints/0000004.pt", trained / "checkpoints/0000004.pt")


def test_tensorboard_has_the_scores(scored):
    events = EventAccumulator(str(scored / "tensorboard"))
    events.Reload()
    for name in ("fid", "held_out_loss", "held_out_loss/expert_05"):
        values = {event.step: event.value for event in events.Scalars(name)}
        assert values == pytest.approx({step: line[name] for step, line in scores(scored).items()})


@pytest.mark.slow
def test_two_processes_with_sharded_bases(scored, features, held_out, reference, tmp_path):
    """They divide the samples and the noise levels. The scores equal those of one process for the same weights."""
    flags = [*training_flags(features, tmp_path, "two"), "--max-steps=4", "--shard-bases"]
    run("train_fast.py", *flags, *score_flags(reference, held_out, every=4), processes=2)
    logged = scores(tmp_path / "two")[4]
    assert logged["fid"] == fid_of_the_scripts(tmp_path / "two/checkpoints/0000004.pt", reference, tmp_path)
    assert logged == pytest.approx(scores(scored)[4], rel=1e-2)


@pytest.mark.parametrize("model", [pytest.param("DiT-T/2", marks=pytest.mark.slow), "RemixDiT-T/2"])
def test_flows_and_statistics_as_reference(features, held_out, reference, tmp_path, model):
    """The last step is scored also if it is no multiple of the interval."""
    flags = [*training_flags(features, tmp_path, "run", model), "--process=flow", "--max-steps=1"]
    run("train_fast.py", *flags, *score_flags(reference, held_out), f"--score-against={reference / 'stats.npz'}")
    logged = scores(tmp_path / "run")[1]
    assert logged["fid"] == fid_of_the_scripts(tmp_path / "run/checkpoints/0000001.pt", reference, tmp_path)
    assert len(logged) == (2 if model == "DiT-T/2" else 2 + 6)


def test_samples_of_latents_need_their_vae(moments, vae, tmp_path):
    network = export_network(ToyNetwork(), tmp_path / "toy.pt2", side=16)
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8))
    flags = [*training_flags(moments, tmp_path, "run", "DiT-T/2"), "--max-steps=1", f"--weights={network}"]
    flags += ["--score-every=1", f"--score-samples={SAMPLES}", f"--score-against={tmp_path / 'ref.npz'}"]
    assert "--score-against needs --vae" in run("train_fast.py", *flags, expect=2).stderr
    assert not (tmp_path / "run").exists()
    run("train_fast.py", *flags, f"--vae={vae}")
    expected = fid_of_the_scripts(tmp_path / "run/checkpoints/0000001.pt", tmp_path, tmp_path)
    assert scores(tmp_path / "run")[1] == {"fid": expected}


def test_a_resumed_run_does_not_score_a_step_again(scored, features, held_out, reference, tmp_path, monkeypatch):
    """The first run is stopped while it scores a step, whose checkpoint is due later. It then scores it first."""
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=4", *score_flags(reference, held_out)]
    draw = training.scoring.sample

    def stop_in_the_first_batch(*arguments, **options):
        if '"step": 2' in (tmp_path / "run/metrics.jsonl").read_text():
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments, **options)

    monkeypatch.setattr(training.scoring, "sample", stop_in_the_first_batch)
    assert "stopped by SIGTERM after step 2" in run("train_fast.py", *flags).stderr
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["0000002.pt"]
    assert scores(tmp_path / "run") == {0: scores(scored)[0]}
    monkeypatch.setattr(training.scoring, "sample", draw)
    stderr = run("train_fast.py", *flags, "--resume=auto").stderr
    assert scores(tmp_path / "run") == scores(scored)
    assert stderr.index("step 0000002/0000004  FID") < stderr.index("step 0000003/0000004  loss")
    stderr = run("train_fast.py", *flags, "--score-samples=30", "--resume=auto").stderr
    assert scores(tmp_path / "run") == scores(scored)
    assert "scores up to step 4 had --score-samples 70, not 30" in stderr
    assert "scored in" not in stderr
    assert "step 4 is scored already" in stderr


def test_training_continues_if_scoring_fails(features, held_out, reference, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training.scoring, "sample", fail)
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=4", *score_flags(reference, held_out)]
    assert run("train_fast.py", *flags).stderr.count("COULD NOT SCORE") == 3
    assert set(losses(tmp_path / "run")) == {1, 2, 3, 4}
    assert [next(iter(line)) for line in scores(tmp_path / "run").values()] == ["held_out_loss"] * 3


def test_features_that_are_not_finite_have_no_fid():
    score = object.__new__(FidScore)
    score.world, score.reference, score.statistics = (
        World(0, 1, torch.device("cpu")),
        "ref.npz",
        (np.zeros(2), np.eye(2)),
    )
    features = [torch.randn(8, 2), torch.randn(8, 2)]
    assert np.isfinite(score.combine(features)["fid"])
    features[1][3, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        score.combine(features)


def test_a_step_is_scored_if_it_has_all_scores(tmp_path):
    """A run that is resumed with another score measures it."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "fid": 1.0, "held_out_loss": 0.1}, {"step": 4, "loss": 0.1}, {"step": 4, "held_out_loss": 0.1}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert is_scored(metrics, 4, {"held_out_loss"})
    assert not is_scored(metrics, 4, {"held_out_loss", "fid"})
    assert is_scored(metrics, 2, {"held_out_loss", "fid"})
    assert is_scored(metrics, 2, {"fid"})


def test_scores_that_cannot_be_compared_with_earlier_ones_are_named(tmp_path):
    flags = {"score_every": 5, "score_against": str(tmp_path / "ref.npz"), "held_out": "h"}
    write_json(tmp_path / "config.json", {"flags": flags})
    same = ScoreSettings(5, f"{tmp_path}/./ref.npz", n_samples=5000, held_out="h", vae="none")
    assert changed_measures(tmp_path, same, 10) == []
    assert changed_measures(tmp_path, replace(same, reference=None, n_samples=None, weights=None), 10) == []
    lines = changed_measures(tmp_path, replace(same, n_samples=100, weights="toy.pt2", held_out="other"), 10)
    assert lines == [
        f"scores up to step 10 had --{text}: later ones cannot be compared"
        for text in ("weights None, not toy.pt2", "score-samples 5000, not 100", "held-out h, not other")
    ]


def test_independent_experts_have_held_out_losses_only(features, held_out, reference, tmp_path):
    flags = [*training_flags(features, tmp_path, "run", "DiT-T/2"), "--max-steps=2", "--independent=2"]
    refused = run("train_fast.py", *flags, *score_flags(reference, None), expect=2).stderr
    assert "trained on all noise levels" in refused
    assert not (tmp_path / "run-0").exists()
    run("train_fast.py", *flags, "--score-every=1", f"--held-out={held_out}")
    low, high = (scores(tmp_path / f"run-{i}")[1]["held_out_loss"] for i in range(2))
    assert low > high, "the noise is harder to predict where there is little of it"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--score-every=2"], "needs --score-against for FID, --held-out"),
        (["--score-against=ref.npz"], "need --score-every"),
        (["--score-every=2", "--held-out=held-out", "--weights=toy.pt2"], "--weights needs --score-against"),
        (["--score-every=2", "--score-against=ref.npz", "--weights=absent.pt2"], "absent.pt2: no such file"),
        (["--score-every=2", "--score-against=absent.npz", "--weights=toy.pt2"], "absent.npz: no such file"),
        (["--score-every=2", "--score-against=few.npz", "--weights=toy.pt2"], "at least 4 uint8 images"),
        (["--score-every=2", "--score-against=stats.npz", "--weights=other.pt2"], "statistics of another network"),
        (["--score-every=2", "--score-against=short.npz", "--weights=toy.pt2"], "another number of features"),
        (["--score-every=2", "--score-against=nan.npz", "--weights=toy.pt2"], "statistics that are not finite"),
        (["--score-every=2", "--score-against=ref.npz", "--weights=large.pt2"], "have 8x8 pixels but the network"),
        (["--score-every=2", "--score-against=ref.npz", "--score-samples=3"], "at least 4"),
        (["--score-every=2", "--held-out=absent"], "no such folder of features"),
        (["--score-every=2", "--held-out=small"], "encoded in shape"),
        (["--score-every=2", "--held-out=renamed"], "encoded in classes"),
        (["--score-every=2", "--held-out=unlabelled"], "labels from -1 to 2"),
    ],
)
def test_wrong_input(features, held_out, reference, wrong_files, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(wrong_files)
    all_flags = [*training_flags(features, tmp_path / "out", "wrong"), "--max-steps=2", *flags]
    error = run("train_fast.py", *all_flags, expect=2).stderr
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def wrong_files(held_out, reference, tmp_path_factory) -> Path:
    """A folder with the files of `reference`, the features `held_out`, and files that do not fit."""
    folder = tmp_path_factory.mktemp("wrong")
    for path in reference.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "held-out").symlink_to(held_out)
    np.savez(folder / "few.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    with np.load(reference / "stats.npz") as stats:
        short = dict(stats) | {"mu": stats["mu"][:5], "sigma": stats["sigma"][:5, :5]}
        nan = dict(stats) | {"mu": np.full_like(stats["mu"], np.nan)}
    np.savez(folder / "short.npz", **short)
    np.savez(folder / "nan.npz", **nan)
    network = ToyNetwork()
    export_network(torch.nn.Sequential(torch.nn.Identity(), network), folder / "other.pt2")
    export_network(network, folder / "large.pt2", side=16)
    index = dict(vae="none", scale=1.0, image_size=8, classes=["class0", "class1", "class2"])
    changes = {"small": {"image_size": 4}, "renamed": {"classes": ["a", "b", "c"]}}
    for name, change in changes.items():
        side = 4 if name == "small" else 8
        write_shard(folder / name, 0, np.zeros((6, 1, 3, side, side)), np.arange(6) % 3, {})
        write_index(folder / name, 1, **index | change)
    # The original layout, in which one image has no label.
    for kind, values in {"features": np.zeros((2, 1, 3, 8, 8), np.float32), "labels": np.array([[-1], [2]])}.items():
        (folder / f"unlabelled/x_{kind}").mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(folder / f"unlabelled/x_{kind}/{i}.npy", value)
    return folder
