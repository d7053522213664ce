"""The dry run of train_fast.py: sizes, FLOPs and memory."""

import re
from functools import partial

import pytest
import torch
from conftest import run
from torch.distributed._tools.mem_tracker import MemTracker

from diffusion import create_diffusion
from models import DiT_models
from remix import RemixDiT, RemixDiT_models
from runtime.processes import World
from training.batches import sample_timesteps
from training.dry_run import Parallelism, activation_bytes, count_checkpoints, memory_bytes, step_costs
from training.trainer import Trainer


def test_a_dry_run_with_features_that_exist(features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--model=DiT-T/2", f"--data-path={features}", "--max-steps=3")
    report = run("train_fast.py", *flags, "--dry-run").stdout
    assert f"24 images of 3 classes as 3 x 8 x 8 (from {features})" in report
    assert all(word in report for word in ("GiB (estimate)", "hours (estimate)", "bound by"))
    flow = run("train_fast.py", *flags, "--dry-run", "--process=flow", "--time-shift=3").stdout
    assert "flow matching: path=linear, prediction=velocity" in flow
    assert "shift=3.0" in flow
    weighted = run("train_fast.py", *flags, "--dry-run", "--min-snr=5", "--min-weight=0.2").stdout
    assert "loss weight min(SNR, 5.0) / SNR, at least 0.2" in weighted
    wrong = run("train_fast.py", "--data-path", "nowhere", "--image-size", 20, "--dry-run", expect=2)
    assert wrong.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "parameters", "gmacs"), [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71)])
def test_sizes_and_flops_are_those_of_the_dit_paper(tmp_path, monkeypatch, size, parameters, gmacs):
    """Peebles & Xie, arXiv 2212.09748, tables 1 and 4 (their Gflops are multiply-adds)."""
    monkeypatch.chdir(tmp_path)
    report = run("train_fast.py", f"--model=DiT-{size}/2", "--data-path=x", "--dry-run").stdout
    assert float(re.search(r"([\d.]+) M parameters", report)[1]) == pytest.approx(parameters, abs=0.6)
    assert float(re.search(r"([\d.]+) TFLOP per step", report)[1]) == pytest.approx(
        3 * 2 * gmacs * 256 / 1000, rel=0.01
    )


def test_activation_bytes_are_what_autograd_stores():
    """The count without computing equals the count with real tensors."""
    stored = {}

    def store(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    build = partial(RemixDiT_models["RemixDiT-T/2"], input_size=8, n_basis=2, n_experts=4)
    model, diffusion = build(), create_diffusion()
    x, t = torch.randn(8, 4, 8, 8), torch.arange(4).repeat_interleave(2) * 250
    conditions = {"y": torch.zeros_like(t), "label_drop": t > 0, "groups": 4}
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        graph = diffusion.training_losses(model, x, t, conditions, torch.randn_like(x))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    real = sum(size for address, size in stored.items() if address not in weights)
    del graph
    with torch.device("meta"):
        shapes = build()
    counted = activation_bytes(shapes, diffusion, 8, 4, torch.bfloat16)
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("name", "n_images", "groups", "checkpoint_activations"),
    [
        ("DiT-T/2", 8, None, False),
        ("RemixDiT-T/2", 8, 4, False),
        ("RemixDiT-T/2", 16, 8, True),
        ("RemixDiT-S/2", 2, 2, False),
        pytest.param("DiT-S/2", 4, None, True, marks=pytest.mark.slow),
        pytest.param("RemixDiT-S/2", 16, 4, False, marks=pytest.mark.slow),
    ],
)
def test_the_memory_is_that_of_a_real_step(name, n_images, groups, checkpoint_activations):
    """Within 10 %, including the temporary tensors of a step, which the plan does not count."""
    build = partial((DiT_models | RemixDiT_models)[name], input_size=32 if "-S" in name else 16)
    with torch.device("meta"):
        shapes = build()
    parallelism = Parallelism(checkpoint_activations=checkpoint_activations)
    planned = memory_bytes(shapes, create_diffusion(), n_images, groups, "bf16", parallelism)

    model, world = build(), World(0, 1, torch.device("cpu"))
    # MemTracker cannot track a parameter that is not trained.
    (model.backbone if groups else model).pos_embed.requires_grad_(True)
    options = {"precision": "bf16", "checkpoint_activations": checkpoint_activations}
    trainer = Trainer(model, create_diffusion(), world, lr=1e-4, **options)
    config = model.backbone_config
    x = torch.randn(n_images, 4, config["input_size"], config["input_size"])
    t = torch.from_numpy(sample_timesteps(0, 0, n_images, 20, groups or 1))
    conditions = {"y": torch.zeros_like(t), "label_drop": t > 0} | ({"groups": groups} if groups else {})
    # The first step makes AdamW's moments.
    trainer.step(0, [(x, t, conditions, x)])
    tracker = MemTracker()
    tracker.track_external(trainer.model, trainer.optimizer, *trainer.ema.parameters())
    with tracker:
        trainer.step(1, [(x, t, conditions, x)])
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(planned.values()) == pytest.approx(peak, rel=0.1)


def shapes_of(size: str, n_basis: int | None = None):
    """A DiT, or a RemixDiT with K bases and N = 20, on the meta device."""
    with torch.device("meta"):
        dit = DiT_models[f"DiT-{size}"](input_size=32)
        return RemixDiT(dit, n_basis, n_experts=20) if n_basis else dit


def test_what_sharded_bases_cost():
    """With g groups per GPU they send g / 2 times the gradients of the mixed layers of a DiT, for any K."""
    plain, whole, sharded = Parallelism(8), Parallelism(8), Parallelism(8, sharded=True)
    dit = step_costs(shapes_of("S/2"), 32, None, "bf16", plain)
    named = [pair for block in shapes_of("S/2").blocks for pair in block.named_parameters()]
    # A ring of 8 sends 7/8 of the gradients in float32, twice.
    mixed_gradients = 2 * 4 * 7 / 8 * sum(p.numel() for name, p in named if "adaLN" not in name)
    for groups in (1, 2, 4):
        k4, k8 = (step_costs(shapes_of("S/2", k), 32, groups, "bf16", sharded) for k in (4, 8))
        assert k4.sent == pytest.approx(k8.sent, rel=1e-4), "but for the logits"
        assert k4.sent - dit.sent == pytest.approx((groups / 2 - 1) * mixed_gradients, rel=1e-4, abs=1e3)
        ddp = step_costs(shapes_of("S/2", 8), 32, groups, "bf16", whole)
        assert k8.flops == ddp.flops == dit.flops
        assert k8.traffic["optimizer"] < ddp.traffic["optimizer"] / 4
        assert k8.traffic["mixing"] < ddp.traffic["mixing"]


def test_what_binds_a_step():
    """Many nodes with a slow network and plain DDP, long matrix products, and many bases for few images."""
    network = step_costs(shapes_of("XL/2", 8), 2, 2, "bf16", Parallelism(64))
    compute = step_costs(shapes_of("XL/2"), 128, None, "bf16", Parallelism(8))
    memory = step_costs(shapes_of("S/2", 8), 2, 2, "bf16", Parallelism(8))
    assert network.bound("bf16", 64) == "network"
    assert network.step_seconds("bf16", 64) == network.seconds("bf16", 64)["network"]
    assert compute.bound("bf16", 8) == "compute"
    assert memory.bound("bf16", 8) == "memory traffic"
    assert compute.step_seconds("fp32", 8) > 1.2 * compute.step_seconds("bf16", 8)


def test_recomputed_activations_cost_time_and_save_memory():
    stored, recomputed = Parallelism(), Parallelism(checkpoint_activations=True)
    costs = [step_costs(shapes_of("B/2"), 32, None, "bf16", parallelism) for parallelism in (stored, recomputed)]
    memory = [
        sum(memory_bytes(shapes_of("B/2"), create_diffusion(), 32, None, "bf16", each).values())
        for each in (stored, recomputed)
    ]
    assert costs[1].flops == pytest.approx(4 / 3 * costs[0].flops)
    assert costs[1].traffic["activations"] > costs[0].traffic["activations"]
    assert memory[1] < 0.6 * memory[0]


def test_the_space_for_checkpoints(tmp_path):
    """The counts are those of the checkpoints that exist at the same time, beyond those that exist now."""
    assert count_checkpoints(tmp_path, 0, 10, every=3, keep=None, keep_every=None) == 4
    assert count_checkpoints(tmp_path, 6, 10, every=3, keep=None, keep_every=None) == 2
    assert count_checkpoints(tmp_path, 0, 100, every=5, keep=2, keep_every=None) == 3
    assert count_checkpoints(tmp_path, 0, 100, every=5, keep=2, keep_every=50) == 5
    (tmp_path / "checkpoints").mkdir()
    for step in (45, 50):
        (tmp_path / f"checkpoints/{step:07d}.pt").touch()
    assert count_checkpoints(tmp_path, 50, 100, every=5, keep=2, keep_every=50) == 3
