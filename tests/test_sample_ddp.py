"""Sampling from a checkpoint: what is written, what it depends on, resuming, and wrong input."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    FEW_SAMPLES,
    GOLDEN,
    ROOT,
    check_sampling_refused,
    disk_full_of,
    file_limit,
    locked,
    make_images,
    run,
    sampled_images,
    start,
    training_flags,
)
from PIL import Image
from torch._dynamo.utils import counters

from checkpoint import load_model
from diffusion import create_diffusion, create_process
from interop.own import save_checkpoint
from models import DiT_models
from runtime.errors import UserError
from runtime.processes import SampleGenerators
from sample_ddp import class_numbers, finished
from sampling.pipeline import label_of


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_results(sampled):
    x = sampled_images(sampled)
    assert (x.shape, x.dtype) == ((14, 8, 8, 3), np.uint8)
    assert sorted(path.name for path in sampled.iterdir()) == ["grid.png", "png", "samples.npz", "settings.json"]
    assert np.array_equal(np.array(Image.open(sampled / "png" / "000009.png")), x[9])
    labels = np.load(sampled / "samples.npz")["arr_1"]
    assert labels.tolist() == [label_of(0, i, 3) for i in range(14)]
    assert Image.open(sampled / "grid.png").width > 10 * 48


def test_settings_are_recorded(ckpt, sampled):
    settings = json.loads((sampled / "settings.json").read_text())
    fingerprints = settings.pop("ckpt_fingerprint")
    assert len(fingerprints) == 1
    assert settings == {
        "ckpt": [str(ckpt)],
        "backbone": load_model(ckpt)[1]["model"]["backbone"],
        "process": "gaussian",
        "vae": "none",
        "num_fid_samples": 14,
        "sampler": "ddpm",
        "num_sampling_steps": "8",
        "cfg_scale": 1.5,
        "cfg_all_channels": False,
        "ema": True,
        "global_seed": 0,
        "per_proc_batch_size": 32,
        "save_png": True,
        "precision": "fp32",
        # What has no meaning for these settings, or was not asked for.
        **dict.fromkeys(("diffusion_form", "last_step", "last_step_size", "guidance_interval", "labels"), None),
        **dict.fromkeys(("guide_ckpt", "guide_fingerprint", "step_sizes"), None),
        **dict.fromkeys(("vae_fingerprint", "latent_stats"), None),
        **dict.fromkeys(("time_shift", "last_level", "guided_channels"), None),
    }


@pytest.mark.parametrize(
    ("batch", "processes"),
    [
        (7, 1),
        pytest.param(32, 2, marks=pytest.mark.slow, id="one batch for two processes"),
        (5, 2),
    ],
)
def test_a_sample_depends_on_its_index_only(ckpt, sampled, tmp_path, batch, processes):
    flags = (f"--sample-dir={tmp_path}", "--name=other", f"--per-proc-batch-size={batch}")
    run("sample_ddp.py", "--ckpt", ckpt, *FEW_SAMPLES, *flags, processes=processes)
    assert largest_difference(sampled_images(tmp_path / "other"), sampled_images(sampled)) <= 1


def test_a_solvers_sample_depends_on_its_index_only(ckpt, tmp_path):
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, "--sample-dir", tmp_path, "--sampler", "dpmpp")
    run("sample_ddp.py", *flags, "--name", "one")
    run("sample_ddp.py", *flags, "--name", "two", "--per-proc-batch-size", 5)
    one, two = (sampled_images(tmp_path / name) for name in ("one", "two"))
    assert largest_difference(one, two) <= 1
    assert one.astype(int).std() > 10


def test_a_second_run_into_the_same_folder_is_refused(ckpt, tmp_path):
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, "--sample-dir", tmp_path, "--name", "one")
    with locked(tmp_path / "one") as writer:
        stderr = run("sample_ddp.py", *flags, expect=2).stderr
        assert f"is in use by process {writer.pid}" in stderr
        assert stderr.count("\n") == 1
    # A writer that was killed leaves its lock file behind.
    assert [path.name for path in (tmp_path / "one").iterdir()] == [".lock"]
    run("sample_ddp.py", *flags)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["grid.png", "samples.npz", "settings.json"]


def test_a_model_that_has_diverged(ckpt, tmp_path):
    """The samples of one class are not finite."""
    labels = [label_of(0, i, 3) for i in range(14)]
    broken = next(label for label in range(3) if label != labels[0])
    state = torch.load(ckpt, weights_only=True)
    state["ema"]["backbone.y_embedder.embedding_table.weight"][broken] = torch.nan
    save_checkpoint(tmp_path / "diverged.pt", state)
    flags = ("--ckpt", tmp_path / "diverged.pt", *FEW_SAMPLES, "--sample-dir", tmp_path, "--name", "one")
    stderr = run("sample_ddp.py", *flags, expect=2).stderr
    first = labels.index(broken)
    assert f"sample {first} is not finite: the training of {tmp_path / 'diverged.pt'} has diverged" in stderr
    assert not (tmp_path / "one/samples.npz").exists()


@pytest.mark.parametrize("limit", [1000, 3500, 10_000])
def test_a_full_disk(ckpt, tmp_path, limit):
    """The limit is too small for a batch, for the grid, or for all samples in one file."""
    flags = ("--ckpt", ckpt.parent.parent, "--sample-dir", tmp_path, "--name=one", "--per-proc-batch-size=10")
    flags += ("--num-fid-samples=60", "--num-sampling-steps=2", "--vae=none")
    with file_limit(limit):
        stderr = run("sample_ddp.py", *flags, expect=2).stderr
    assert stderr.splitlines()[-1].endswith(": File too large")
    assert "Traceback" not in stderr
    assert not (tmp_path / "one/samples.npz").exists()
    run("sample_ddp.py", *flags)
    assert len(sampled_images(tmp_path / "one")) == 60


def test_a_killed_writers_file_does_not_fill_the_disk(ckpt, tmp_path):
    with disk_full_of(tmp_path / "one/.samples.npz.99999.tmp"):
        run("sample_ddp.py", "--ckpt", ckpt, "--sample-dir", tmp_path, "--name=one", *FEW_SAMPLES)


@torch.no_grad()
def test_sampling_equals_the_plain_loop(ckpt, sampled):
    """Folding, guidance and batching change nothing: sample 5 is repeated alone, with the unfolded model."""
    model, _ = load_model(ckpt)
    generators = SampleGenerators(0, [5])
    noise = generators.randn((3, 8, 8)).expand(2, -1, -1, -1)
    x = create_diffusion("8").p_sample_loop(
        model.forward_with_cfg,
        (2, 3, 8, 8),
        noise=noise,
        model_kwargs={"y": torch.tensor([label_of(0, 5, 3), 3]), "cfg_scale": 1.5},
        step_noise=lambda step: generators.randn((3, 8, 8)).expand(2, -1, -1, -1),
    )
    expected = (127.5 * x[0] + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert largest_difference(expected, sampled_images(sampled)[5]) <= 1


@pytest.fixture(scope="module")
def flow_ckpt(features, tmp_path_factory):
    """A checkpoint of a flow with K = 2 and N = 6, with noise added to its weights, so that the experts differ."""
    path = tmp_path_factory.mktemp("flow")
    run("train_fast.py", *training_flags(features, path, "flow"), "--max-steps=1", "--process=flow", "--time-shift=2")
    file = path / "flow/checkpoints/0000001.pt"
    state = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for key, value in state["ema"].items():
        if value.ndim >= 2 and "pos_embed" not in key:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    save_checkpoint(file, state)
    return file


FLOW_FLAGS = {
    "euler": ("--num-sampling-steps=12",),
    "heun": ("--sampler=heun", "--num-sampling-steps=5"),
    "dopri5": ("--sampler=dopri5",),
    "sde": ("--sampler=sde", "--num-sampling-steps=12", "--diffusion-form=linear", "--last-step=tweedie"),
}


@pytest.mark.parametrize("name", FLOW_FLAGS)
@torch.no_grad()
def test_sampling_a_flow_equals_the_plain_loop(flow_ckpt, tmp_path, name):
    """Folding, guidance and batching change nothing: sample 5 is repeated alone, with the unfolded model."""
    # One sample in the last batch. The steps of dopri5 depend on the batch.
    flags = ("--num-fid-samples=6", "--per-proc-batch-size=5", f"--sample-dir={tmp_path}", "--name=flow")
    run("sample_ddp.py", "--ckpt", flow_ckpt, *flags, *FLOW_FLAGS[name])
    model, config = load_model(flow_ckpt)
    flow = create_process(**config["diffusion"])
    generators = SampleGenerators(0, [5])
    noise = generators.randn((3, 8, 8))
    label = torch.tensor([label_of(0, 5, 3), 3])

    def denoise(x, t):
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), label, 1.5)[:1]

    if name == "sde":
        options = dict(form="linear", last_step="tweedie", step_noise=lambda step: generators.randn((3, 8, 8)))
        x = flow.sde_sample_loop(denoise, noise.shape, noise=noise, steps=12, **options)
    else:
        options = dict(steps=5 if name == "heun" else 12, boundaries=model.boundaries)
        x = flow.ode_sample_loop(denoise, noise.shape, noise=noise, method=name, **options)
    expected = (127.5 * x[0] + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    images = sampled_images(tmp_path / "flow")
    assert largest_difference(expected, images[5]) <= 1
    assert images.astype(int).std() > 10
    settings = json.loads((tmp_path / "flow/settings.json").read_text())
    assert (settings["sampler"], settings["process"]) == (name, "flow")
    assert (settings["step_sizes"] is not None) == (name == "dopri5")
    assert (settings["diffusion_form"] is not None) == (name == "sde")


@torch.no_grad()
def test_the_steps_of_sampling_can_differ_from_those_of_training(flow_ckpt, tmp_path):
    """Another shift, a last noise level before data, and guidance of the first channel only."""
    flags = ("--num-fid-samples=2", f"--sample-dir={tmp_path}", "--num-sampling-steps=7", "--cfg-scale=3")
    flags += ("--time-shift=3", "--last-level=0.2", "--guided-channels=1")
    run("sample_ddp.py", "--ckpt", flow_ckpt, *flags)
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("euler7-cfg3.0-shift3-to0.2-channels1-seed0")
    settings = json.loads((folder / "settings.json").read_text())
    assert [settings[name] for name in ("time_shift", "last_level", "guided_channels")] == [3, 0.2, 1]
    model, _ = load_model(flow_ckpt)
    noise = SampleGenerators(0, [1]).randn((3, 8, 8))
    label = torch.tensor([label_of(0, 1, 3), 3])

    def denoise(x, t):
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), label, 3.0, 1)[:1]

    # Noise levels u are evenly spaced from 1 to 0.2, and then shifted.
    u = np.linspace(1, 0.2, 8)
    times = torch.from_numpy(1 - 3 * u / (1 + 2 * u)).float()
    x = noise
    for t, following in pairwise(times):
        x = x + (following - t) * denoise(x, t[None])[:, :3]
    expected = (127.5 * x[0] + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert largest_difference(expected, sampled_images(folder)[1]) <= 1


def test_samples_of_earlier_versions_are_continued(tmp_path):
    """They did not record the weights of a VAE in a folder, nor the statistics of the latents."""
    record = {"vae": "folder", "vae_fingerprint": "a", "latent_stats": "b"}
    (tmp_path / "settings.json").write_text('{"vae": "folder"}')
    assert not finished(tmp_path, record)
    (tmp_path / "settings.json").write_text(json.dumps(record))
    assert not finished(tmp_path, record)
    with pytest.raises(UserError, match="latent_stats=b, not c"):
        finished(tmp_path, record | {"latent_stats": "c"})


def test_the_process_of_a_foreign_file_can_be_given(tmp_path):
    """The networks of DiT and SiT have the same tensors, so a bare state dict does not say its process."""
    torch.manual_seed(0)
    model = DiT_models["DiT-T/4"](input_size=8, in_channels=3, num_classes=3)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    flags = ("--ckpt", tmp_path / "bare.pt", *FEW_SAMPLES, "--sample-dir", tmp_path)
    run("sample_ddp.py", *flags, "--name=gaussian")
    run("sample_ddp.py", *flags, "--name=flow", "--process=flow")
    assert json.loads((tmp_path / "flow/settings.json").read_text())["sampler"] == "euler"
    assert not np.array_equal(sampled_images(tmp_path / "gaussian"), sampled_images(tmp_path / "flow"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sampler=ddpm",), "use one of euler, heun, dopri5, sde"),
        (("--process=gaussian",), "was trained with --process flow"),
        (("--sampler=dopri5",), "--num-sampling-steps has no meaning"),
        (("--diffusion-form=sigma",), "--diffusion-form has no meaning for --sampler euler"),
        (("--sampler=sde", "--last-step-size=1"), "last_step_size must be between"),
        (("--sampler=sde", "--last-step=none", "--last-step-size=0.1"), "no meaning for --last-step none"),
        (("--num-sampling-steps=ddim8",), "whole number"),
        (("--sampler=sde", "--last-level=0.1"), "--last-level has no meaning for --sampler sde"),
        (("--last-level=1",), "must be at least 0 and below 1, not 1.0"),
        (("--guided-channels=4",), "denoises 3 channels"),
        (("--guided-channels=2", "--cfg-all-channels"), "contradict each other"),
    ],
)
def test_wrong_input_for_a_flow(flow_ckpt, tmp_path, flags, message):
    check_sampling_refused(flow_ckpt, tmp_path / "out", flags, message)


def test_interrupted_sampling_is_finished(ckpt, tmp_path):
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, f"--sample-dir={tmp_path}", "--name=again", "--per-proc-batch-size=7")
    run("sample_ddp.py", *flags)
    folder = tmp_path / "again"
    done = sampled_images(folder)
    (folder / "samples.npz").unlink()
    (folder / "parts").mkdir()
    # Changed samples show that the part is not sampled again.
    np.save(folder / "parts" / "000000.npy", 255 - done[:7])
    run("sample_ddp.py", *flags)
    assert np.array_equal(sampled_images(folder), np.concatenate([255 - done[:7], done[7:]]))
    assert "nothing to do" in run("sample_ddp.py", *flags).stdout
    refused = run("sample_ddp.py", *flags, "--cfg-scale", 4, expect=2)
    assert "cfg_scale=1.5, not 4.0" in refused.stderr


def test_processes_that_have_read_different_checkpoints_end(ckpt, trained, tmp_path):
    """A run that trains may write a checkpoint after one process has looked for the newest one."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    flags = [*FEW_SAMPLES, f"--sample-dir={tmp_path}", "--name=s", "--per-proc-batch-size=7"]
    ranks = [
        start(
            [ROOT / "sample_ddp.py", f"--ckpt={path}", *flags],
            *(tmp_path / f"{kind}{rank}" for kind in ("out", "err")),
            **group,
            WORLD_SIZE=2,
            RANK=rank,
            LOCAL_RANK=rank,
        )
        for rank, path in enumerate((ckpt, trained))
    ]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [2, 2]
    assert "the processes have read different files" in (tmp_path / "err0").read_text()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("labels", "expected"), [("equal", [0, 1, 2, 0, 1, 2]), ("2,class0, 2", [2, 0, 2, 2, 0, 2])])
def test_chosen_labels(ckpt, tmp_path, labels, expected):
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, "--num-fid-samples=6", "--num-sampling-steps=1", f"--sample-dir={tmp_path}")
    run("sample_ddp.py", *flags, f"--labels={labels}")
    (folder,) = tmp_path.iterdir()
    assert np.load(folder / "samples.npz")["arr_1"].tolist() == expected
    assert json.loads((folder / "settings.json").read_text())["labels"] == (
        labels if labels == "equal" else expected[:3]
    )
    if labels != "equal":
        wrong = run("sample_ddp.py", *flags, "--labels=class1,Bag", "--name=other", expect=2).stderr
        assert f"--labels Bag: {ckpt} has the classes class0, class1, class2\n" in wrong


def test_a_number_that_is_the_name_of_another_class_is_warned_about(capsys):
    config = {"data": {"classes": ["0", "1", "10", "2"]}}
    assert class_numbers([0, 2, "10"], config, "a.pt") == [0, 2, 2]
    [line] = capsys.readouterr().err.splitlines()
    assert line == "warning: --labels 2 is the class of this number; the class of the name 2 is number 3"


def test_equal_labels_differ_in_number_by_at_most_one():
    """For N samples of C classes, each class has N / C samples, rounded up or down."""
    counts = np.bincount([label_of(0, i, 10, "equal") for i in range(57)])
    assert set(counts) == {5, 6}


@pytest.mark.parametrize(
    "flags",
    [
        ("--sampler", "ddim"),
        ("--sampler", "unipc"),
        ("--cfg-scale", 1),
        ("--cfg-all-channels", "--precision", "bf16"),
        ("--no-ema",),
    ],
)
def test_other_flags(ckpt, sampled, tmp_path, flags):
    run("sample_ddp.py", "--ckpt", ckpt, *FEW_SAMPLES, "--sample-dir", tmp_path, *flags)
    (folder,) = tmp_path.iterdir()
    assert sampled_images(folder).shape == (14, 8, 8, 3)
    # A model of pixels has three channels, which are all guided anyway.
    if "--cfg-all-channels" not in flags:
        assert not np.array_equal(sampled_images(folder), sampled_images(sampled))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--n-basis=2", "--n-experts=6", "--tf32"), "run-0000004-ddpm8-cfg1.5-seed0"),
        (("--no-ema", "--sampler=ddim", "--cfg-scale=1", "--global-seed=3"), "run-0000004-raw-ddim8-cfg1.0-seed3"),
    ],
)
def test_the_folder_is_named_after_the_checkpoint_and_the_settings(ckpt, tmp_path, flags, name):
    run("sample_ddp.py", "--ckpt", ckpt, *FEW_SAMPLES, f"--sample-dir={tmp_path}", *flags)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ckpt", "/nowhere.pt"), "no such file"),
        (("--model", "RemixDiT-S/2"), "not RemixDiT-S/2"),
        (("--num-classes", "10"), "was trained with 3"),
        (("--labels", "0,3"), "--labels 3: "),
        (("--labels", "cat"), "has the classes class0, class1, class2"),
        (("--num-sampling-steps", "2000"), "cannot keep 2000"),
        (("--sampler", "heun"), "use one of ddpm, ddim"),
        (("--time-shift", "2"), "--time-shift has no meaning for --sampler ddpm"),
        (("--vae", "/no/such/vae"), "cannot load the VAE"),
        (("--n-experts", "8"), "--n-experts 8, but"),
        (("--n-basis", "4", "--n-experts", "6"), "was trained with 2: leave the flag out"),
        (("--no-tf32",), "--precision replaces it"),
    ],
)
def test_wrong_input(ckpt, tmp_path, flags, message):
    check_sampling_refused(ckpt, tmp_path / "out", flags, message)


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_independent_experts(features, tmp_path, process):
    files = []
    highest = create_process(process).scale.highest
    for low, high in ((0.5 * highest, highest), (0, 0.5 * highest)):
        flags = training_flags(features, tmp_path, f"expert-{low}", "DiT-T/2")
        run("train_fast.py", *flags, "--max-steps", 2, "--process", process, "--timesteps", low, high)
        files.append(tmp_path / f"expert-{low}/checkpoints/0000002.pt")
    run("sample_ddp.py", "--ckpt", *files, *FEW_SAMPLES, "--sample-dir", tmp_path, "--name", "both")
    alone = run("sample_ddp.py", "--ckpt", files[0], *FEW_SAMPLES, "--sample-dir", tmp_path, "--name", "alone")
    levels = "timesteps 500 to 999" if process == "gaussian" else "noise levels 0.5 to 1"
    assert f"was trained on the {levels} only" in alone.stderr
    assert not np.array_equal(sampled_images(tmp_path / "both"), sampled_images(tmp_path / "alone"))
    for wrong, message in (
        ((files[0], files[0]), "exactly once"),
        ((files[0], GOLDEN / "dit.pt"), "holds no state dict"),
    ):
        done = run("sample_ddp.py", "--ckpt", *wrong, *FEW_SAMPLES, "--sample-dir", tmp_path / "no", expect=2)
        assert message in done.stderr
    # Models of the same shape, whose classes have other numbers or whose latents another scale.
    state = torch.load(files[1], weights_only=True)
    for key, value in (("classes", ["class1", "class0", "class2"]), ("scale", 2.0)):
        data = state["config"]["data"] | {key: value}
        save_checkpoint(tmp_path / "other.pt", state | {"config": state["config"] | {"data": data}})
        for flags in (
            ["--ckpt", files[0], tmp_path / "other.pt"],
            ["--ckpt", files[0], "--guide-ckpt", tmp_path / "other.pt"],
        ):
            refused = run("sample_ddp.py", *flags, *FEW_SAMPLES, "--sample-dir", tmp_path / "no", expect=2).stderr
            assert ("other classes than" if key == "classes" else "other normalization of the latents than") in refused


def test_latent_models_from_images_to_samples(vae, tmp_path):
    tree = make_images(tmp_path / "images", size=16)
    flags = (f"--data-path={tree}", f"--features-path={tmp_path / 'f'}", f"--vae={vae}", "--image-size=16")
    run("extract_features.py", *flags, "--num-workers=0")
    run("train_fast.py", *training_flags(tmp_path / "f", tmp_path, "latent"), "--max-steps", 3, "--num-classes", 9)
    ckpt = tmp_path / "latent/checkpoints/0000003.pt"
    state = torch.load(ckpt, weights_only=True)
    # Both layers are zero at initialization: without the second one the label would hardly change the output.
    generator = torch.Generator().manual_seed(0)
    for name in ("linear", "adaLN_modulation.1"):
        weight = state["ema"][f"backbone.final_layer.{name}.weight"]
        weight += 0.3 * torch.randn(weight.shape, generator=generator)
    save_checkpoint(ckpt, state)
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, "--sample-dir", tmp_path / "samples")
    run("sample_ddp.py", *flags, "--name", "three")
    run("sample_ddp.py", *flags, "--name", "four", "--cfg-all-channels")
    three, four = (sampled_images(tmp_path / "samples" / name) for name in ("three", "four"))
    assert three.shape == (14, 16, 16, 3)
    assert not np.array_equal(three, four), "by default three of the four latent channels are guided"
    labels = np.load(tmp_path / "samples/three/samples.npz")["arr_1"]
    assert set(labels) <= {0, 1, 2}, "only classes that there were images of"
    refused = run("sample_ddp.py", *flags, "--name", "pixels", "--vae", "none", expect=2).stderr
    assert "denoises 4 channels" in refused
    assert not (tmp_path / "samples/pixels").exists()


@pytest.mark.slow
def test_compiled_sampling_is_the_same_and_compiles_once(ckpt, sampled, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, "--sample-dir", tmp_path, "--compile", "--per-proc-batch-size", 4)
    run("sample_ddp.py", *flags, "--name", "compiled")
    assert largest_difference(sampled_images(tmp_path / "compiled"), sampled_images(sampled)) <= 1
    # Four batches, the last one of two samples.
    assert counters["stats"]["unique_graphs"] == 1
