import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_trainer, random_microbatch, random_remix_dit, relative
from torch import nn
from torch._dynamo.utils import counters

from diffusion import create_flow
from models import DiT
from remix import RemixDiT
from runtime.processes import World
from training.batches import BatchSampler, StepBatch

pytestmark = pytest.mark.usefixtures("exact_products")


# The first backend traces and divides the same graphs as the default one, but writes no kernels.
CASES = [("cpu", "aot_eager_decomp_partition"), pytest.param("cpu", "inductor", marks=pytest.mark.slow)]
CASES += [("cuda", "inductor")] if torch.cuda.is_available() else []
cases = pytest.mark.parametrize(("device", "backend"), CASES)


@pytest.fixture
def compile_with(monkeypatch):
    """Return a function that selects the backend of torch.compile."""
    compiler = torch.compile
    return lambda backend: monkeypatch.setattr(torch, "compile", partial(compiler, backend=backend))


@cases
def test_training_in_bf16_and_compiled_follows_fp32_and_compiles_once(device, backend, compile_with):
    """After twenty steps the change of the weights and the loss are close to those of fp32 without compilation.

    The experts and the weight of the prior change in every step.
    """
    compile_with(backend)
    changes, losses, experts_seen = [], [], set()
    for precision, compiled in (("fp32", False), ("bf16", True)):
        model = random_remix_dit(device)
        start = copy.deepcopy(model.state_dict())
        world = World(0, 1, torch.device(device))
        trainer = make_trainer(model, world=world, lr=1e-3, precision=precision, compile=compiled, max_steps=20)
        for step in range(20):
            batch = random_microbatch(step, device=device)
            experts_seen.add(tuple(model.expert_index(batch.t).tolist()))
            trainer.set_schedule(step)
            trainer.step(step, [batch])
        changes.append(torch.cat([(model.state_dict()[key] - start[key]).flatten() for key in start]))
        losses.append(trainer.stats.read()[0]["loss"])
    # Adam's first steps are the signs of the gradients, and rounding changes some of the signs.
    assert nn.functional.cosine_similarity(*changes, dim=0) > 0.9
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert len(experts_seen) > 10
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_learning_rates_of_the_warm_up_and_the_schedules():
    rates = {}
    for schedule in ("cosine", "constant"):
        options = {"lr": 1.0, "coeff_lr": 10.0, "coeff_lr_end": 2.0, "max_steps": 8, "lr_schedule": schedule}
        trainer = make_trainer(random_remix_dit(depth=1), warmup=4, **options)
        rates[schedule] = []
        for step in range(9):
            trainer.set_schedule(step)
            rates[schedule].append((trainer.schedule()["lr"], trainer.schedule()["coeff_lr"]))
    rise = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert rates["constant"] == [(factor, 10 * factor) for factor in rise]
    fall = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    expected = [(f * (0.5 + 0.5 * c), f * (2 + 8 * c)) for f, c in zip(rise, fall, strict=True)]
    assert np.array(rates["cosine"]) == pytest.approx(np.array(expected))


def test_weight_decay_and_beta2_are_those_of_adamw_and_spare_the_logits():
    batch, steps = random_microbatch(), {}
    for decay, beta2 in ((0.0, 0.999), (0.5, 0.999), (0.0, 0.9)):
        trainer = make_trainer(random_remix_dit(depth=1), lr=1e-2, weight_decay=decay, beta2=beta2)
        before = [p.detach().clone() for p in trainer.trained]
        for step in range(2):
            trainer.step(step, [batch])
        steps[decay, beta2] = [p.detach() - b for p, b in zip(trainer.trained, before, strict=True)]
        groups = trainer.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [decay, 0]
        assert [group["betas"] for group in groups] == [(0.9, beta2)] * 2
        logits = next(i for i, p in enumerate(trainer.trained) if p is trainer.experts.logits[0])
    plain, decayed, other = steps.values()
    assert relative(decayed[logits], plain[logits]) < 0.05
    # Two steps take 1e-2 x 0.5 of each weight away, beside the gradient's step.
    weights = next(i for i, p in enumerate(trainer.trained) if p.ndim == 3)
    assert relative(decayed[weights] - plain[weights], -2 * 5e-3 * before[weights]) < 0.2
    assert relative(other[weights], plain[weights]) > 1e-3


@pytest.mark.parametrize("checkpoint_activations", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_flow_compiles_to_one_graph(compile_with, checkpoint_activations):
    compile_with("eager")
    flow = create_flow()
    model = RemixDiT(DiT(8, 2, 4, 32, 3, 2, num_classes=10), n_basis=4, n_experts=20, boundaries=flow.quantiles(20))
    options = {"compile": True, "checkpoint_activations": checkpoint_activations, "cosine_weight": 1.0, "max_steps": 4}
    trainer = make_trainer(model, flow, precision="bf16", **options)
    for step in range(4):
        batch = random_microbatch(step)
        trainer.set_schedule(step)
        trainer.step(step, [batch._replace(t=1 - (batch.t + 0.5) / 1000)])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    losses = trainer.stats.read()[0]
    assert losses["loss"] > 0 and losses["cosine"] > 0


@cases
@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_compiled_and_uncompiled_gradients_agree(device, backend, microbatches, compile_with):
    compile_with(backend)
    gradients = []
    for compiled in (False, True):
        world = World(0, 1, torch.device(device))
        trainer = make_trainer(random_remix_dit(device), world=world, lr=0, compile=compiled, prior_strength=1e-2)
        # CUDA graphs are recorded in the second step and run from the third step on.
        for step in range(4):
            batches = [random_microbatch(2 * step + i, device=device) for i in range(microbatches)]
            trainer.step(step, batches)
        gradients.append([p.grad.clone() for p in trainer.trained])
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-6) for pair in zip(*gradients, strict=True))


@torch._dynamo.config.patch(optimize_ddp=True)
def test_the_trainer_that_runs_decides_how_graphs_are_cut_for_ddp(compile_with):
    """It is a setting of the process, and several trainers may have different ones."""
    compile_with("eager")
    first, second = (make_trainer(random_remix_dit(), compile=True) for _ in range(2))
    second.optimize_ddp = False
    for trainer in (first, second, first):
        trainer.step(0, [random_microbatch()])
        assert torch._dynamo.config.optimize_ddp == trainer.optimize_ddp


@pytest.mark.slow
def test_each_number_of_groups_is_compiled_separately(compile_with):
    """Otherwise the second number would become a symbolic size, be reused for the third, and be slower than both."""
    compile_with("eager")
    for groups in (2, 4, 8):
        trainer = make_trainer(random_remix_dit(depth=1), precision="bf16", compile=True)
        trainer.step(0, [random_microbatch(size=16, groups=groups)])
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recomputed_activations_give_the_same_steps_with_less_memory(compiled, compile_with):
    """Two microbatches per step, each of other experts: the backward pass needs the coefficients of its own batch."""
    # This backend chooses what to recompute as the default one does, but writes no kernels.
    compile_with("aot_eager_decomp_partition")
    weights, losses, stored = [], [], []
    for recompute in (False, True):
        model, sizes = random_remix_dit(), {}

        def store(tensor: torch.Tensor, sizes: dict = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        trainer = make_trainer(model, lr=1e-3, compile=compiled, checkpoint_activations=recompute)
        for step in range(0, 6, 2):
            trainer.step(step, [random_microbatch(step), random_microbatch(step + 1)])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        losses.append(trainer.stats.read()[0]["loss"])
        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            graph = trainer.loss(random_microbatch(), (torch.zeros(()),))
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        stored.append(sum(size for storage, size in sizes.items() if storage not in parameters))
        del graph
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if compiled else 0)
    assert torch.allclose(weights[1], weights[0], atol=1e-4 if compiled else 0)
    # In this tiny model, a part of what compiled code stores does not depend on the number of images.
    assert stored[1] < (0.75 if compiled else 0.5) * stored[0]


def test_the_state_of_a_checkpoint_does_not_change_in_later_steps():
    """A thread writes it while training continues."""
    model = random_remix_dit("cpu")
    trainer = make_trainer(model, lr=1e-3)
    trainer.step(0, [random_microbatch(0)])
    state = trainer.state_dict()
    moments = [tensor for tensors in state["optimizer"]["state"].values() for tensor in tensors.values()]
    tensors = [*state["model"].values(), *state["ema"].values(), *moments]
    before = copy.deepcopy(tensors)
    trainer.step(1, [random_microbatch(1)])
    assert not torch.equal(model.logits, state["model"]["logits"])
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_a_loss_that_is_not_finite_changes_nothing_but_the_statistics():
    model = random_remix_dit()
    trainer = make_trainer(model, lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    infinite = random_microbatch()
    infinite.x[3, 0, 0, 0] = torch.inf
    trainer.step(7, [random_microbatch(), infinite])
    assert trainer.stats.longest_streak() == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    losses, nonfinite = trainer.stats.read()
    assert losses["loss"] is None
    assert nonfinite.step == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", True)])
def test_a_training_step_does_not_wait_for_the_device(precision, compiled):
    world = World(0, 1, torch.device("cuda"))
    trainer = make_trainer(random_remix_dit("cuda"), world=world, clip_grad=1.0, precision=precision, compile=compiled)
    sampler = BatchSampler(0, 8, world, n_experts=20, experts_per_batch=4)
    x, y = torch.randn(8, 4, 8, 8), torch.zeros(8, dtype=torch.long)
    batches = [StepBatch(*(part.pin_memory() for part in sampler.draw(number, x, y)[:5])) for number in range(8)]

    def step(number: int):
        trainer.step(number, sampler.microbatches(batches[number]))
        trainer.stats.longest_streak()

    # A CUDA graph is recorded in the second step.
    for number in range(4):
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(4, 8):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
