"""Loggers and previews: they record everything about a run and do not change it."""

import logging
import os
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, assert_same_weights, file_limit, losses, make_images, run, start, training_flags
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint import load_model
from diffusion import as_denoiser, create_process
from runtime.files import write_json
from runtime.processes import seed_for
from training.loggers import MetricLogger, MetricsFile, WandbLogger
from training.posthoc_ema import write_snapshot
from training.previews import GUIDANCE
from training.run import remove_outdated


@pytest.fixture(scope="module")
def shown(tmp_path_factory, features):
    """The run `trained` with all loggers and previews, resumed after two steps."""
    path = tmp_path_factory.mktemp("shown")
    flags = [*training_flags(features, path, "run"), "--max-steps", 4, "--ckpt-every", 2, "--sample-every", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run("train_fast.py", *flags, "--log-to", "tensorboard,wandb")
        (path / "run/checkpoints/0000004.pt").unlink()
        run("train_fast.py", *flags, "--log-to", "tensorboard,wandb", "--resume", "auto")
    return path / "run"


def test_previews_and_loggers_do_not_change_the_run(shown, trained):
    assert losses(shown) == losses(trained)
    assert_same_weights(shown / "checkpoints/0000004.pt", trained / "checkpoints/0000004.pt")
    assert {path.name for path in (shown / "samples").iterdir()} == {"0000002.png", "0000004.png"}


def test_the_heat_map_equals_that_of_visualize(shown, tmp_path):
    run("visualize.py", "coefficients", shown / "checkpoints/0000004.pt", "--out", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes() == (shown / "coefficients/0000004.png").read_bytes()


def test_tensorboard_has_every_step_once(shown):
    events = EventAccumulator(str(shown / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    values = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert values == pytest.approx(losses(shown))
    for name in ("mse", "vb", "prior", "lr", "coeff_lr", "images_per_s", "mfu", "entropy", "expert_spread"):
        assert len(events.Scalars(name)) == 4
    for name in ("samples", "coefficients"):
        assert [event.step for event in events.Images(name)] == [2, 4]
        with Image.open(shown / name / "0000004.png") as image:
            assert (events.Images(name)[1].width, events.Images(name)[1].height) == image.size


def test_wandb_continues_the_same_run(shown):
    runs = list((shown / "wandb").glob("offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in runs} == {(shown / "wandb-id.txt").read_text()}
    records = b"".join(path.read_bytes() for path in (shown / "wandb").glob("offline-run-*/run-*.wandb"))
    for step, loss in losses(shown).items():
        assert str(loss).encode() in records, f"the loss of step {step}"
    assert b"images_per_s" in records
    pictures = [path.name for path in (shown / "wandb").glob("offline-run-*/files/media/images/*.png")]
    assert {name.rpartition("_")[0] for name in pictures} >= {f"{kind}_4" for kind in ("samples", "coefficients")}


def test_a_new_run_shows_nothing_of_one_that_left_no_checkpoint(features, tmp_path, monkeypatch):
    flags = [
        *training_flags(features, tmp_path, "run", "DiT-T/2"),
        "--log-to=tensorboard",
        "--ema-snapshot-dtype=float32",
    ]
    run("train_fast.py", *flags, "--max-steps=4", "--ckpt-every=9", "--sample-every=2", "--ema-snapshots=2")
    (tmp_path / "run/checkpoints/0000004.pt").unlink()
    lost = losses(tmp_path / "run")
    run("train_fast.py", *flags, "--max-steps=3", "--global-seed=1", "--sample-every=3", "--ema-snapshots=3")
    # Two snapshots and two pictures of samples.
    assert "REMOVED 4 files of an earlier run" in (tmp_path / "run/log.txt").read_text()
    for kind in ("ema", "samples"):
        assert [path.stem for path in (tmp_path / "run" / kind).iterdir()] == ["0000003"]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"images": 0})
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(losses(tmp_path / "run")) and shown[1] != pytest.approx(lost[1])
    assert [event.step for event in events.Images("samples")] == [3]

    ids = []
    monkeypatch.setattr("wandb.init", lambda id, **options: ids.append(id))
    for step in (0, 0, 2):
        WandbLogger(tmp_path, {}, step)
    assert ids[0] != ids[1] == ids[2]


def test_later_steps_of_another_schedule_are_removed(tmp_path):
    training = {"max_steps": 4, "schedule_steps": None}
    write_json(tmp_path / "config.json", {"training": training})
    for step in (2, 4):
        write_snapshot(tmp_path, step, {}, "float32")
    assert remove_outdated(tmp_path, {"training": dict(training)}, 2) == 0
    assert len([*(tmp_path / "ema").iterdir()]) == 2, "a run that resumes repeats the same steps"
    assert remove_outdated(tmp_path, {"training": training | {"max_steps": 6}}, 2) == 1
    assert [path.stem for path in (tmp_path / "ema").iterdir()] == ["0000002"]


def test_two_processes_with_previews(trained, features, tmp_path):
    flags = [*training_flags(features, tmp_path, "two"), "--max-steps", 4, "--sample-every", 1]
    run("train_fast.py", *flags, processes=2)
    assert_same_weights(trained / "checkpoints/0000004.pt", tmp_path / "two/checkpoints/0000004.pt", exact=False)
    assert len(list((tmp_path / "two/samples").iterdir())) == 4


def test_samples_of_latents(vae, features, tmp_path):
    tree = make_images(tmp_path / "images", size=16)
    flags = ["--data-path", tree, "--vae", vae, "--image-size", 16, "--num-workers", 0]
    run("extract_features.py", *flags, "--features-path", tmp_path / "features")
    flags = [*training_flags(tmp_path / "features", tmp_path, "raw", "DiT-T/2"), "--max-steps", 1, "--sample-every", 1]
    wrong = [*training_flags(features, tmp_path, "x"), f"--vae={vae}"]
    assert "does not decode" in run("train_fast.py", *wrong, expect=2).stderr
    assert "three latent channels" in run("train_fast.py", *flags).stderr
    run("train_fast.py", *flags, "--prefix", "decoded", "--vae", vae)
    grids = [np.array(Image.open(tmp_path / name / "samples/0000001.png")) for name in ("raw", "decoded")]
    assert grids[0].shape == grids[1].shape, "both are enlarged to tiles of 64 pixels"
    assert not np.array_equal(*grids)
    assert not (tmp_path / "raw/coefficients").exists(), "a plain DiT has no coefficients"


def test_samples_equal_those_of_the_checkpoint(shown, features):
    """The last tile is the sample of the EMA weights for that label and noise."""
    model, _ = load_model(shown / "checkpoints/0000004.pt")
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed_for(0, 15)))
    labels = torch.tensor([2, 3])

    def denoise(x, t):
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, GUIDANCE)[:1]

    with torch.no_grad():
        process = create_process()
        sample = process.make_sampler(*process.quick)(as_denoiser(denoise), noise)
    pixels = (127.5 * sample[0] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    tile = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    grid = Image.open(shown / "samples/0000004.png")
    corner = (grid.width - 4 - 64, grid.height - 4 - 64)
    assert np.abs(np.array(grid.crop((*corner, corner[0] + 64, corner[1] + 64)), int) - np.array(tile, int)).max() <= 1


def test_training_continues_if_a_picture_cannot_be_written(features, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").write_text("a file instead of a folder")
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=2", "--sample-every=1"]
    assert run("train_fast.py", *flags).stderr.count("COULD NOT DRAW") == 2
    assert (tmp_path / "run/coefficients/0000002.png").exists()
    assert (tmp_path / "run/checkpoints/0000002.pt").exists()


def test_an_independent_expert_has_no_samples(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "expert", "DiT-T/2"), "--timesteps", 0, 500, "--max-steps", 1]
    assert "trained on some noise levels only" in run("train_fast.py", *flags, "--sample-every", 1).stderr
    assert not (tmp_path / "expert/samples").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log-to", "tensorboard,paper"], "unknown logger 'paper'"),
        (["--log-to", "wandb"], "pip install wandb"),
        (["--vae", str(GOLDEN)], "cannot load the VAE"),
    ],
)
def test_wrong_input(features, tmp_path, monkeypatch, flags, message):
    # None makes an import fail, as if wandb were not installed.
    monkeypatch.setitem(sys.modules, "wandb", None)
    all_flags = [*training_flags(features, tmp_path / "out", "wrong"), "--max-steps=1", *flags]
    error = run("train_fast.py", *all_flags, expect=2).stderr
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wandb_without_a_key(features, tmp_path, monkeypatch):
    """The script runs in a separate process, because wandb reads the environment only once per process."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    flags = [*training_flags(features, tmp_path, "run", "DiT-T/2"), "--max-steps", 1, "--log-to", "wandb"]
    # The process has no terminal, on which wandb would ask for a key.
    process = start([ROOT / "train_fast.py", *flags], tmp_path / "out", tmp_path / "err", HOME=tmp_path)
    process.join(120)
    stderr = (tmp_path / "err").read_text()
    assert process.exitcode == 2, stderr[-2000:]
    assert stderr.splitlines()[-1].startswith("train_fast.py: error: --log-to wandb:")
    assert "WANDB_MODE=offline" in stderr
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.log_metrics(1, {"step": 1})
    with file_limit(path.stat().st_size + 5), pytest.raises(OSError, match="File too large"):
        file.log_metrics(2, {"step": 2})
    file.log_metrics(3, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_logger_that_fails_is_reported_and_the_others_still_log(tmp_path, caplog):
    class Recorder:
        def __init__(self, failure: Exception | None = None):
            self.failure, self.steps = failure, []

        def log_metrics(self, step: int, metrics: dict):
            if self.failure:
                raise self.failure
            self.steps.append(step)

    broken, working = Recorder(OSError("no space left")), Recorder()
    MetricLogger([broken, working], logging.getLogger("test")).log_metrics(3, {"loss": 1.0})
    assert working.steps == [3]
    assert [record.message for record in caplog.records] == [
        "COULD NOT LOG to Recorder: no space left; training continues"
    ]
