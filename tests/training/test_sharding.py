"""Several processes with whole and with sharded bases: gradients, losses, checkpoints, bytes, DDP's buckets."""

import copy
import math
import re
from collections import Counter
from itertools import product
from pathlib import Path

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import random_remix_dit, relative
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from mixing import grouped_linear
from mixing.experts import stored_state
from models import DIT, DiT_models
from remix import RemixDiT, RemixDiT_models
from runtime.errors import UserError
from runtime.processes import World
from training.batches import BatchSampler
from training.experts import experts_of
from training.settings import Execution, RunSettings
from training.sharding import bytes_sent, choose_sharding, gather_rows
from training.trainer import BUCKETS, Trainer, bucket_mib

BATCH = 16
STEPS = range(6)
ONE = World(0, 1, torch.device("cpu"))


def in_processes(size: int, function, *arguments):
    """Run function(world, *arguments) in `size` processes of one gloo group."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # The processes are forks of the server of conftest.py.
    start_processes(_process, (size, store.port, function, *arguments), nprocs=size, start_method="forkserver")


def _process(rank: int, size: int, port: int, function, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("localhost", port), rank=rank, world_size=size)
    function(World(rank, size, torch.device("cpu")), *arguments)
    dist.destroy_process_group()


def make_trainer(world: World, model: RemixDiT | None = None, **options) -> Trainer:
    return conftest.make_trainer(model or random_remix_dit(), world=world, lr=1e-3, **options)


def microbatches(world: World, step: int, grad_accum: int = 1) -> list:
    """Draw this process's microbatches of a global batch of 16 rows in four groups."""
    sampler = BatchSampler(0, BATCH, world, n_experts=20, experts_per_batch=4, grad_accum=grad_accum)
    x = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    return sampler.microbatches(sampler.draw(step, x[sampler.rows], torch.arange(BATCH)[sampler.rows] % 10))


def train(trainer: Trainer, steps: range, grad_accum: int = 1) -> dict:
    """Train, and return the first step's whole gradients (on rank 0) and their norm, and the losses of all steps."""
    world, result = trainer.world, {"losses": []}
    check = trainer._check_gradients

    def record():
        norm, nonfinite = check()
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        for name in trainer.shards:
            gradients[name] = gather_rows(gradients[name], world.rank, world.size)
        result.setdefault("gradients", gradients)
        result.setdefault("norm", norm.item())
        return norm, nonfinite

    trainer._check_gradients = record
    for step in steps:
        trainer.step(step, microbatches(world, step, grad_accum))
        result["losses"].append(trainer.stats.read()[0]["loss"])
    trainer._check_gradients = check
    return result


def check_training(world: World, folder: Path, depth: int, compiled: bool):
    expected = torch.load(folder / "one.pt")
    options = [{"shard": False}, {"shard": True}]
    if not compiled:
        options.append({"shard": True, "checkpoint_activations": True})
    for chosen, grad_accum in product(options, (1, 2)):
        torch._dynamo.reset()
        trainer = make_trainer(world, random_remix_dit(depth=depth), compile=compiled, **chosen)
        result = train(trainer, STEPS, grad_accum)
        case = f"{chosen}, grad_accum={grad_accum}"
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5), case
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5), case
        for name, gradient in expected["gradients"].items() if world.is_main else ():
            assert relative(result["gradients"][name], gradient) < 1e-5, f"{case}: {name}"


@pytest.mark.parametrize(
    ("size", "compiled"),
    [(2, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, False), (2, True)))],
)
def test_gradients_norm_and_losses_are_those_of_one_process(tmp_path, size, compiled):
    # Compilation takes several seconds per block.
    depth = 1 if compiled else 2
    torch.save(train(make_trainer(ONE, random_remix_dit(depth=depth)), STEPS), tmp_path / "one.pt")
    in_processes(size, check_training, tmp_path, depth, compiled)


def model_without_biases() -> RemixDiT:
    model = random_remix_dit(depth=1)
    for name, layer in model.mixed():
        if name.endswith("qkv"):
            layer.bias = None
    return model


def check_layers_without_biases(world: World, folder: Path):
    expected = torch.load(folder / "one.pt")
    trainer = make_trainer(world, model_without_biases(), shard=True)
    result = train(trainer, range(3))
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    whole = trainer.whole_ema()
    if world.is_main:
        assert {name: tensor.shape for name, tensor in whole.state_dict().items()} == expected["shapes"]
        for name, gradient in expected["gradients"].items():
            assert relative(result["gradients"][name], gradient) < 1e-5, name


def test_sharded_layers_without_biases_get_none(tmp_path):
    one = make_trainer(ONE, model_without_biases())
    shapes = {name: tensor.shape for name, tensor in one.model.state_dict().items()}
    torch.save(train(one, range(3)) | {"shapes": shapes}, tmp_path / "one.pt")
    in_processes(2, check_layers_without_biases, tmp_path)


def continue_run(world: World, folder: Path, steps: range, shard: bool, grad_accum: int):
    """Train from the checkpoint in `folder` and replace it."""
    trainer = make_trainer(world, shard=shard)
    trainer.load_state_dict(torch.load(folder / "state.pt", mmap=True), "state.pt")
    losses = train(trainer, steps, grad_accum)["losses"]
    # All means have been read.
    state = trainer.state_dict() | {"window": trainer.stats.state_dict()}
    ema, (distances, spread) = trainer.whole_ema(), trainer.model.distances()
    if world.is_main:
        assert all(torch.equal(value, state["ema"][key]) for key, value in stored_state(ema).items())
        whole = random_remix_dit()
        whole.load_state_dict(state["model"])
        torch.testing.assert_close((distances, spread), whole.distances())
        torch.save(state, folder / "new.pt")
        (folder / "new.pt").rename(folder / "state.pt")
        torch.save(losses, folder / f"losses-{steps.start}.pt")


@pytest.mark.parametrize(
    "runs",
    [
        # number of processes, sharded, microbatches
        [(2, True, 1), (2, False, 2)],
        pytest.param([(2, True, 1), (4, False, 2), (4, True, 1), (2, True, 2), (2, False, 1)], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_a_run_resumes_with_any_sharding_and_number_of_processes(tmp_path, runs):
    """Each run takes two steps from the checkpoint of the one before it, the first one from one of a single process."""
    whole = make_trainer(ONE)
    train(whole, range(2))
    torch.save(whole.state_dict() | {"window": whole.stats.state_dict()}, tmp_path / "state.pt")
    expected, found = train(whole, range(2, 2 + 2 * len(runs)))["losses"], []
    for i, (size, shard, grad_accum) in enumerate(runs):
        start = 2 + 2 * i
        in_processes(size, continue_run, tmp_path, range(start, start + 2), shard, grad_accum)
        found += torch.load(tmp_path / f"losses-{start}.pt")
    assert found == pytest.approx(expected, rel=1e-5)
    state, last = whole.state_dict(), torch.load(tmp_path / "state.pt")
    for part in ("model", "ema"):
        for name, value in state[part].items():
            torch.testing.assert_close(last[part][name], value, rtol=1e-3, atol=1e-4, msg=f"{part}.{name}")
    assert last["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for i, moments in state["optimizer"]["state"].items():
        assert {key: value.shape for key, value in moments.items()} == {
            key: value.shape for key, value in last["optimizer"]["state"][i].items()
        }


class CountBytes(TorchDispatchMode):
    """Counts what a process sends, by the kind of the exchange."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.sent = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        others = (self.size - 1) / self.size
        name = str(function)
        if name == "_c10d_functional.all_to_all_single.default":
            self.sent["mixtures"] += others * args[0].nbytes
        elif name == "_c10d_functional.all_gather_into_tensor.default":
            self.sent["experts"] += (self.size - 1) * args[0].nbytes
        elif name == "c10d.allreduce_.default":
            self.sent["gradients"] += 2 * others * sum(tensor.nbytes for tensor in args[0])
        elif name.startswith(("c10d.", "_c10d_functional.")) and "wait_tensor" not in name:
            self.sent[name] += math.inf
        return function(*args, **(kwargs or {}))


def check_bytes(world: World):
    sent = {}

    def ring(numbers: int) -> float:
        """The bytes that a process sends to sum float32 numbers over the processes."""
        return 2 * 4 * numbers * (world.size - 1) / world.size

    for shard, grad_accum, n_basis, precision in product((False, True), (1, 2), (4, 8), ("fp32", "bf16")):
        model = RemixDiT(random_remix_dit(depth=1).expert(0), n_basis, 20)
        parts = microbatches(world, 0, grad_accum)
        settings = RunSettings(global_batch_size=BATCH, experts_per_batch=4, precision=precision)
        expected = bytes_sent(experts_of(model), settings, Execution(world.size, grad_accum, shard))
        trainer = make_trainer(world, model, shard=shard, precision=precision)
        # DDP arranges its buckets in the first two steps.
        trainer.step(0, parts)
        trainer.step(1, parts)
        with CountBytes(world.size) as counter:
            trainer.step(2, parts)
        # Neither the experts nor the norm of the shards' gradients are mixtures or gradients.
        small = counter.sent.pop("experts", 0) + ring(1)
        case = f"shard={shard}, grad_accum={grad_accum}, {precision}, K={n_basis}"
        assert expected <= counter.sent.total() <= expected + small, f"{case}: {counter.sent}, expected {expected}"
        # The mixing logits have a column per basis.
        logits = ring(model.logits.numel())
        sent[shard, grad_accum, precision, n_basis] = counter.sent.total() - logits
    for shard, grad_accum, precision in product((False, True), (1, 2), ("fp32", "bf16")):
        four, eight = (sent[shard, grad_accum, precision, n_basis] for n_basis in (4, 8))
        assert (four == eight) == shard


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bytes_that_a_process_sends_are_counted_and_do_not_depend_on_the_number_of_bases(size):
    in_processes(size, check_bytes)


def check_agreement(world: World):
    """An infinite gradient of one process's rows must be seen by all processes."""
    for precision in ("fp32", "fp16"):
        trainer = make_trainer(world, shard=True, precision=precision)
        before = copy.deepcopy(trainer.model.state_dict())
        scale = trainer.scaler.get_scale()
        if world.rank == 1:
            layer = trainer.model.mixed()[0][1]
            layer.bias.register_hook(lambda gradient: gradient + math.inf)
        trainer.step(0, microbatches(world, 0))
        assert trainer.stats.read()[1].count == 1, precision
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()), precision
        assert trainer.scaler.get_scale() == scale / (2 if precision == "fp16" else 1)


def test_all_processes_skip_a_step_if_the_gradient_of_a_shard_is_not_finite():
    in_processes(2, check_agreement)


def check_gradient_memory(world: World):
    for shard in (False, True):
        trainer = make_trainer(world, shard=shard)
        addresses = set()

        def record(stage, trainer=trainer, addresses=addresses):
            if stage == "backward":
                addresses.add(tuple(p.grad.data_ptr() for p in trainer.trained))

        trainer.step(0, microbatches(world, 0, grad_accum=2))
        trainer.mark = record
        for step in range(1, 3):
            trainer.step(step, microbatches(world, step, grad_accum=2))
        assert len(addresses) == 1, f"shard={shard}"


def test_microbatches_are_summed_in_the_memory_that_is_exchanged():
    in_processes(2, check_gradient_memory)


def test_every_size_of_the_registry_can_be_sharded():
    """The patch size does not change the mixed layers."""
    settings = RunSettings(experts_per_batch=16)
    for size in ("T", "S", "B", "L", "XL"):
        with torch.device("meta"):
            experts = experts_of(RemixDiT_models[f"RemixDiT-{size}/8"](layers=[*DIT.mixed_layers, *DIT.modulation]))
        assert all(choose_sharding(True, experts, settings, Execution(processes))[0] for processes in (2, 4, 8)), size
        with pytest.raises(UserError, match="5 processes do not divide"):
            choose_sharding(True, experts, settings, Execution(5))


def test_bases_are_sharded_on_several_nodes_if_that_sends_less():
    with torch.device("meta"):
        model = RemixDiT_models["RemixDiT-S/2"](n_basis=4)

    def choose(experts_per_batch: int, requested: bool | None = None, model=model, size=16, **settings):
        settings = RunSettings(**{"experts_per_batch": experts_per_batch, "precision": "bf16"} | settings)
        return choose_sharding(requested, experts_of(model), settings, Execution(size))[0]

    # With K = 4 bases, up to seven groups per process send less in bf16, and up to three in fp32.
    assert choose(32)
    assert choose(64)
    assert not choose(128)
    assert choose(128, requested=True)
    assert not choose(32, requested=False)
    assert not choose(64, precision="fp32")
    assert choose(32, precision="fp32")
    assert not choose(32, size=8)
    assert choose(32, size=8, requested=True)
    with pytest.raises(UserError, match="a plain model has no bases"):
        choose(16, requested=True, model=DiT_models["DiT-T/2"]())
    assert not choose(17, size=17, global_batch_size=255)
    with pytest.raises(UserError, match="5 processes do not divide"):
        choose(5, requested=True, size=5, global_batch_size=255)


@pytest.mark.slow
def test_ddp_cuts_the_compiled_graph_of_a_b2_into_a_few_pieces(monkeypatch):
    # The meta device has no autocast.
    monkeypatch.setattr(grouped_linear, "product_dtype", lambda x: x.dtype)
    with torch.device("meta"):
        model = RemixDiT_models["RemixDiT-B/2"]().train()
    pieces = []

    def count(graph, inputs):
        pieces.append(graph)
        return graph

    cap = bucket_mib([p for p in model.parameters() if p.requires_grad])
    model.compile(backend=DDPOptimizer(int(cap * 2**20), count).compile_fn, dynamic=False)
    t, y = torch.zeros(2, 32, dtype=torch.long, device="meta")
    model(torch.empty(32, 4, 32, 32, device="meta"), t, y, groups=2, label_drop=t > 0)
    # A bucket is full within a block, and the first one is small, because it is exchanged first.
    assert 1 < len(pieces) <= BUCKETS + 2


def check_order(world: World):
    trainer = make_trainer(world, random_remix_dit(depth=1), shard=True, compile=True, precision="bf16")
    counters.clear()
    _, programs = run_and_get_code(trainer.step, 0, microbatches(world, 0))
    # The order of the exchanges and of their waits: "all_gather_into_tensor", "all_to_all_single", "wait_tensor".
    forward, backward = (re.findall(r"_c10d_functional\.(\w+)\.default\(", program) for program in programs)
    start, wait = ["all_to_all_single"] * 4, ["wait_tensor"] * 4
    assert forward == ["all_gather_into_tensor", "wait_tensor", *start, *wait]
    assert backward == [*start, *wait]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_exchanges_overlap_with_the_computation():
    """All exchanges start before the first layer waits, and the gradients' exchanges before the mixing waits."""
    in_processes(1, check_order)
