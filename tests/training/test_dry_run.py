"""The dry run of train_fast.py: sizes, FLOPs, memory, bytes sent and measured speeds."""

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_trainer, run, training_flags
from torch.distributed._tools.mem_tracker import MemTracker

from checkpoint import model_config
from diffusion import create_diffusion
from models import DiT_models
from remix import RemixDiT_models
from training.batches import Microbatch, draw_times
from training.dry_run import MEASUREMENTS, activation_bytes, measured_speeds, memory_bytes, step_flops
from training.experts import experts_of
from training.initial import AssumedFeatures
from training.run import Run
from training.settings import Execution, RunSettings
from training.sharding import bytes_sent
from training.writer import Retention, count_checkpoints


def test_a_dry_run_with_features_that_exist(features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--model=DiT-T/2", f"--data-path={features}", "--max-steps=3")
    report = run("train_fast.py", *flags, "--dry-run").stdout
    assert f"24 images of 3 classes as 3 x 8 x 8 (from {features})" in report
    assert "GiB (estimate)" in report and "the speed of this model in bf16 was not measured" in report
    flow = run("train_fast.py", *flags, "--dry-run", "--process=flow", "--time-shift=3").stdout
    assert "flow matching: path=linear, prediction=velocity" in flow
    assert "shift=3.0" in flow
    weighted = run("train_fast.py", *flags, "--dry-run", "--min-snr=5", "--min-weight=0.2").stdout
    assert "loss weight min(SNR, 5.0) / SNR, at least 0.2" in weighted
    wrong = run("train_fast.py", "--data-path", "nowhere", "--image-size", 20, "--dry-run", expect=2)
    assert wrong.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_it_says_what_is_trained(features):
    """Parameters that get gradients, bases, boundaries, the interval of an expert, and what the EMA will hold."""
    flags = (f"--data-path={features}", "--max-steps=300", "--dry-run")
    remix = (*flags, "--model=RemixDiT-T/2", "--n-basis=2", "--n-experts=6")
    report = run(
        "train_fast.py", *remix, "--rank=3", "--mixer=raw", "--mixer-scope=local", "--freeze", "--load-weight=dit.pt"
    ).stdout
    shape = dict(input_size=8, in_channels=3, num_classes=3)
    model = RemixDiT_models["RemixDiT-T/2"](**shape, n_basis=2, n_experts=6, rank=3, mixer="raw", scope="local")
    model.freeze_shared()
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad >= trained) for trained in (True, False)]
    shown = re.search(r"trained parameters: ([\d.]+) M of ([\d.]+) M: the bases and the coefficients", report)
    assert [float(text) for text in shown.groups()] == pytest.approx([count / 1e6 for count in counts], abs=0.006)
    assert (
        "2 bases (pairs of matrices of rank 3), 6 experts, mixer raw, one set per block; boundaries of the experts' "
        "timesteps: 0, 166, 333, 500, 666, 833, 1000\n" in report
    )
    assert "EMA: at the end it still holds 97% of the weights of step 0" in report
    assert "(decay 0.9999 over 300 steps); with --ema-decay 0.985 it would hold 1%" in report
    report = run("train_fast.py", *flags, "--model=DiT-T/2", "--timesteps", 250, 500, "--ema-decay=0.985").stdout
    assert "an independent expert: trained on the timesteps 250 to 499 only" in report
    assert "bases" not in report and "EMA: at the end" not in report


@pytest.mark.parametrize("flags", [(), ("--ema-snapshots=2",), ("--ema-snapshots=1", "--ema-snapshot-dtype=float32")])
def test_the_disk_space_is_that_of_the_run(features, tmp_path, flags):
    """A dry run, the log of the run, and the files that it writes; with the averages for post-hoc EMA and without."""
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=3", "--ckpt-every=2", "--sample-every=0", *flags]
    planned = re.search(
        r".*more checkpoints of ([\d.]+) MiB: ([\d.]+ GiB)", run("train_fast.py", *flags, "--dry-run").stdout
    )
    run("train_fast.py", *flags)
    assert planned[0] in (tmp_path / "run/log.txt").read_text()
    size = (tmp_path / "run/checkpoints/0000002.pt").stat().st_size / 2**20
    assert float(planned[1]) == pytest.approx(size, rel=0.1)
    count = len(list((tmp_path / "run/ema").glob("*.pt")))
    assert ("snapshot" in planned[0]) == bool(count)
    assert not count or planned[0].startswith(f"{count} snapshots of averages and 2 more")


def test_an_independent_expert_is_shorter_than_its_part(features):
    flags = ("--model=DiT-T/2", f"--data-path={features}", "--dry-run", "--independent=4")
    report = run("train_fast.py", *flags, "--max-steps=10").stdout
    assert "--independent 4 does not divide 10 steps: each expert trains for 2 steps, together 8" in report
    report = run("train_fast.py", *flags, "--epochs=3", "--global-batch-size=8").stdout
    assert "--independent 4 does not divide 9 steps: each expert trains for 2 steps, together 8" in report
    assert "does not divide" not in run("train_fast.py", *flags, "--max-steps=12").stdout


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"), [("S", 33, 6.06), pytest.param("L", 458, 80.71, marks=pytest.mark.slow)]
)
def test_sizes_and_flops_are_those_of_the_dit_paper(tmp_path, monkeypatch, size, parameters, gmacs):
    """Peebles & Xie, arXiv 2212.09748, tables 1 and 4 (their Gflops are multiply-adds)."""
    monkeypatch.chdir(tmp_path)
    report = run("train_fast.py", f"--model=DiT-{size}/2", "--data-path=x", "--dry-run").stdout
    assert float(re.search(r"([\d.]+) M parameters", report)[1]) == pytest.approx(parameters, abs=0.6)
    assert float(re.search(r"([\d.]+) TFLOP per step", report)[1]) == pytest.approx(
        3 * 2 * gmacs * 256 / 1000, rel=0.01
    )


def make_run(name: str, n_images: int, groups: int | None, model: dict, **execution) -> Run:
    """A run with this number of images and groups per microbatch, with its model on the meta device."""
    with torch.device("meta"):
        network = (DiT_models | RemixDiT_models)[name](**model)
    execution = Execution(**execution)
    batch_size = n_images * execution.processes * execution.grad_accum
    settings = RunSettings(
        global_batch_size=batch_size, experts_per_batch=(groups or 1) * execution.processes, precision="bf16"
    )
    config = {"model": model_config(name, network)}
    args = Namespace(model=name, independent=None)
    dataset = AssumedFeatures("x", 256, (4, 8))
    return Run(args, Path("x"), dataset, network, create_diffusion(), settings, execution, config, [])


def test_activation_bytes_are_what_autograd_stores():
    """The count without computing equals the count with real tensors."""
    stored = {}

    def store(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    options = dict(input_size=8, n_basis=2, n_experts=4)
    model = RemixDiT_models["RemixDiT-T/2"](**options)
    x, t = torch.randn(8, 4, 8, 8), torch.arange(4).repeat_interleave(2) * 250
    conditions = {"y": torch.zeros_like(t), "label_drop": t > 0, "groups": 4}
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        graph = create_diffusion().training_losses(model, x, t, conditions, torch.randn_like(x))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    real = sum(size for address, size in stored.items() if address not in weights)
    del graph
    assert activation_bytes(make_run("RemixDiT-T/2", 8, 4, options), 8, 4) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    ("name", "n_images", "groups", "checkpoint_activations"),
    [
        ("DiT-T/2", 8, None, False),
        ("RemixDiT-T/2", 8, 4, False),
        ("RemixDiT-T/2", 16, 8, True),
        pytest.param("RemixDiT-S/2", 2, 2, False, marks=pytest.mark.slow),
        pytest.param("DiT-S/2", 4, None, True, marks=pytest.mark.slow),
        pytest.param("RemixDiT-S/2", 16, 4, False, marks=pytest.mark.slow),
    ],
)
def test_the_memory_is_that_of_a_real_step(name, n_images, groups, checkpoint_activations):
    """Within 10 %, including the temporary tensors of a step, which the plan does not count."""
    side = 32 if "-S" in name else 16
    execution = {"checkpoint_activations": checkpoint_activations}
    planned = memory_bytes(make_run(name, n_images, groups, {"input_size": side}, **execution))

    model = (DiT_models | RemixDiT_models)[name](input_size=side)
    # MemTracker cannot track a parameter that is not trained.
    (model.backbone if groups else model).pos_embed.requires_grad_(True)
    trainer = make_trainer(model, precision="bf16", **execution)
    x = torch.randn(n_images, 4, side, side)
    boundaries = create_diffusion().expert_boundaries(20)
    t = torch.from_numpy(draw_times(0, 0, n_images, create_diffusion(), boundaries, groups or 1))
    conditions = {"y": torch.zeros_like(t), "label_drop": t > 0} | ({"groups": groups} if groups else {})
    # The first step makes AdamW's moments.
    trainer.step(0, [Microbatch(x, t, conditions, x)])
    tracker = MemTracker()
    tracker.track_external(trainer.model, trainer.optimizer, *trainer.ema.parameters())
    with tracker:
        trainer.step(1, [Microbatch(x, t, conditions, x)])
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(planned.values()) == pytest.approx(peak, rel=0.1)


def test_sharded_bases_send_what_their_groups_need_for_any_number_of_bases():
    """With g groups per GPU they send g / 2 times the gradients of the mixed layers of a DiT."""

    def sent(name: str, groups: int | None, shard: bool, **model) -> float:
        run = make_run(name, 32, groups, model, processes=8, shard=shard)
        return bytes_sent(experts_of(run.model), run.settings, run.execution)

    dit = sent("DiT-S/2", None, False)
    named = [pair for block in DiT_models["DiT-S/2"]().blocks for pair in block.named_parameters()]
    # A ring of 8 sends 7/8 of the gradients in float32, twice.
    mixed_gradients = 2 * 4 * 7 / 8 * sum(p.numel() for name, p in named if "adaLN" not in name)
    for groups in (1, 2, 4):
        k4, k8 = (sent("RemixDiT-S/2", groups, True, n_basis=k) for k in (4, 8))
        assert k4 == pytest.approx(k8, rel=1e-4), "but for the logits"
        assert k4 - dit == pytest.approx((groups / 2 - 1) * mixed_gradients, rel=1e-4, abs=1e3)


def test_recomputed_activations_cost_operations_and_save_memory():
    flops, memory = [], []
    for recomputed in (False, True):
        run = make_run("DiT-B/2", 32, None, {}, checkpoint_activations=recomputed)
        flops.append(step_flops(run, 32))
        memory.append(sum(memory_bytes(run).values()))
    assert flops[1] == pytest.approx(4 / 3 * flops[0])
    assert memory[1] < 0.6 * memory[0]


def test_the_measured_speed_is_that_of_the_same_model_and_precision_and_of_the_closest_batch():
    def speeds(size: str, n_basis: int | None, n_images: int, groups: int | None, **settings) -> list[str]:
        name, model = (f"RemixDiT-{size}", {"n_basis": n_basis}) if n_basis else (f"DiT-{size}", {})
        run = make_run(name, n_images, groups, model)
        run = replace(run, settings=replace(run.settings, **settings))
        return measured_speeds(run, n_images, groups)

    def measured(name: str, model: str) -> str:
        path = MEASUREMENTS / f"{name}.json"
        result = json.loads(path.read_text())
        speed = next(row["images/s"] for row in result["training"] if row["model"] == model)
        return f"measured: {speed:,.0f} images/s on {result['machine']['device']}, "

    small, large = "h200-b2-b32-bf16-compiled", "h200-b2-b256-bf16-compiled"
    for n_images, groups, name, model in ((32, 4, small, "RemixDiT G=2"), (192, 4, large, "RemixDiT G=4")):
        (line,) = speeds("B/2", 4, n_images, groups)
        assert line.startswith(measured(name, model)) and f"({name}.json)" in line
    (line,) = speeds("S/2", 4, 32, 5)
    assert line.startswith(measured("h200-s2-b32-bf16-compiled", "RemixDiT G=4"))
    (line,) = speeds("B/2", None, 32, None)
    assert line.startswith(measured(small, "DiT"))
    for other in (
        speeds("B/2", 8, 32, 2),
        speeds("B/4", None, 32, None),
        speeds("B/2", 4, 32, 2, precision="fp32"),
    ):
        (line,) = other
        assert line.endswith("was not measured")


def test_the_space_for_checkpoints(tmp_path):
    """The counts are those of the checkpoints that exist at the same time, beyond those that exist now."""
    assert count_checkpoints(tmp_path, 0, 10, Retention(3, None, None)) == 4
    assert count_checkpoints(tmp_path, 6, 10, Retention(3, None, None)) == 2
    assert count_checkpoints(tmp_path, 0, 100, Retention(5, 2, None)) == 3
    assert count_checkpoints(tmp_path, 0, 100, Retention(5, 2, 50)) == 5
    (tmp_path / "checkpoints").mkdir()
    for step in (45, 50):
        (tmp_path / f"checkpoints/{step:07d}.pt").touch()
    assert count_checkpoints(tmp_path, 50, 100, Retention(5, 2, 50)) == 3
