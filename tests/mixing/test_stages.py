"""Stages: several frozen modules, each for an interval of noise levels, with shared low-rank bases."""

import copy
import pickle

import pytest
import torch
from conftest import ROOT, relative, run
from test_low_rank import Tiny, quantize
from torch import Tensor, nn

from interop.expert_folder import find_expert, write_experts
from mixing.experts import stored_parameters, stored_state
from mixing.low_rank import dense_layer
from mixing.options import divide_stages
from remix import Remix
from sampling.experts import FoldedRemix

# Of the experts 0, 2, 3, 1, 2; the last three are those of stage 1.
SIGMA = torch.tensor([0.1, 0.8, 0.95, 0.3, 0.75])
EXPERTS = [0, 2, 3, 1, 2]
STAGES, BOUNDARIES = [0, 0.7, 1], [0, 0.2, 0.7, 0.9, 1]


def modules(width: int = 6, n: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Tiny(width=width) for _ in range(n)]


def wrap(stages: list[nn.Module] | None = None, trained: bool = True, levels=STAGES, **options) -> Remix:
    """A Remix of two stages with K = 3 and N = 4, whose pairs are random if `trained`."""
    settings = dict(timestep="sigma", highest_level=1, boundaries=BOUNDARIES, stages=levels, rank=2) | options
    remix = Remix(stages or modules(), ["a", "b"], 3, **settings)
    for _, layer in remix.mixed() if trained else ():
        nn.init.normal_(layer.lora_B, std=0.3)
    return remix


def inputs(width: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, width, generator=torch.Generator().manual_seed(1)), SIGMA


def trained(remix: Remix) -> list[nn.Parameter]:
    return [p for p in remix.parameters() if p.requires_grad]


class Fails(nn.Module):
    """Stands for a stage that must not be touched."""

    def __getattr__(self, name):
        raise AssertionError("this stage is not needed")

    def forward(self, *args):
        raise AssertionError("this stage is not needed")


# Which module runs an interval


def test_one_object_knows_the_module_of_each_interval():
    first, second = pair = modules()
    stages = wrap(pair).stages
    assert (len(stages), stages.boundaries) == (2, STAGES)
    assert [stages.experts(s) for s in (0, 1)] == [range(2), range(2, 4)]
    assert (stages.module(0), stages.module(1)) == (first, second)
    assert [stages.of(i) for i in range(4)] == [0, 0, 1, 1]
    one = Remix(Tiny(), ["a", "b"], 2, 3, timestep="sigma", highest_level=1)
    assert (len(one.stages), one.stages.boundaries, one.stages.experts(0)) == (1, [0, 1], range(3))
    assert one.stages.module(0) is one.backbone
    assert "stages" not in one.mixing_config


@pytest.mark.parametrize(
    ("stages", "n_experts", "boundaries"),
    [
        ([0, 875, 1000], 2, [0, 875, 1000]),
        ([0, 875, 1000], 3, [0, 437, 875, 1000]),
        ([0, 875.0, 1000], 4, [0, 291, 583, 875, 1000]),
        ([0, 900, 1000], 12, [0, 90, 180, 270, 360, 450, 540, 630, 720, 810, 900, 950, 1000]),
        ([0, 0.5, 1], 4, [0, 0.25, 0.5, 0.75, 1]),
        ([0, 0.4, 0.6, 1], 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_a_number_of_experts_is_divided_over_the_stages(stages, n_experts, boundaries):
    assert divide_stages(stages, n_experts) == pytest.approx(boundaries, rel=1e-15)
    assert {*stages} <= {*divide_stages(stages, n_experts)}


def test_each_stage_is_one_expert_by_default():
    remix = wrap(boundaries=None)
    assert (remix.n_experts, remix.boundaries) == (2, STAGES)
    assert wrap(boundaries=None, n_experts=3).boundaries == [0, 0.35, 0.7, 1]
    assert wrap(boundaries=None, highest_level=None).highest_level == 1


@torch.no_grad()
def test_a_remix_starts_as_its_stages_bit_for_bit():
    first, second = (copy.deepcopy(module) for module in modules())
    remix, (x, sigma) = wrap(trained=False), inputs()
    out = remix(x, sigma)
    high = sigma >= 0.7
    assert torch.equal(out[high], second(x[high], sigma[high]))
    assert torch.equal(out[~high], first(x[~high], sigma[~high]))
    assert torch.equal(remix(x[1:3], sigma[1:3], groups=2), second(x[1:3], sigma[1:3]))
    for i, module in ((0, first), (3, second)):
        assert all(torch.equal(p, q) for p, q in zip(remix.expert(i).parameters(), module.parameters(), strict=True))


# Batches


@pytest.mark.parametrize("scope", ["global", "local"])
@torch.no_grad()
def test_a_batch_is_one_pass_per_stage_and_equals_the_folded_experts(scope):
    remix, (x, sigma) = wrap(scope=scope), inputs()
    expected = torch.cat([remix.expert(e)(x[i : i + 1], sigma[i : i + 1]) for i, e in enumerate(EXPERTS)])
    passes = []
    for s in (0, 1):
        remix.stages.module(s).register_forward_pre_hook(lambda _, args, s=s: passes.append((s, len(args[0]))))
    torch.testing.assert_close(remix(x, sigma), expected)
    assert passes == [(0, 2), (1, 3)]
    passes.clear()
    # Groups of experts 2, 0, 3, 1, two samples each.
    order = [1, 4, 0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(remix(x[order], sigma[order], groups=4), expected[order])
    assert passes == [(0, 4), (1, 4)]
    folded = FoldedRemix(remix)
    for i in (0, 2, 1, 3):
        torch.testing.assert_close(folded(x[i : i + 1], sigma[i : i + 1]), expected[i : i + 1])
    own = {id(p) for p in folded.remix.parameters()}
    assert {id(p) for p in folded.parameters()} <= own, "there is no second copy of the stages"
    plain = remix.expert(0)
    remix.fold_(plain, 3)
    torch.testing.assert_close(plain(x[2:3], sigma[2:3]), expected[2:3])


class Frames(Tiny):
    """Its layers see one row of all tokens of the batch."""

    def forward(self, x, sigma):
        return super().forward(x.reshape(1, -1, x.shape[-1]), sigma).view(x.shape)


@torch.no_grad()
def test_layers_with_other_rows_than_the_samples_run_one_expert_after_the_other():
    torch.manual_seed(0)
    remix, (x, sigma) = wrap([Frames(), Frames()]), inputs()
    expected = torch.cat([remix.expert(e)(x[i : i + 1], sigma[i : i + 1]) for i, e in enumerate(EXPERTS)])
    torch.testing.assert_close(remix(x, sigma), expected)
    assert not remix.runs_at_once


def test_gradients_of_a_batch_are_those_of_its_samples():
    remix, (x, sigma) = wrap(), inputs()
    remix.freeze_shared()
    parameters, weights = trained(remix), torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((remix(x, sigma) * weights).sum(), parameters)
    alone = [(remix(x[i : i + 1], sigma[i : i + 1]) * weights[i]).sum() for i in range(5)]
    expected = torch.autograd.grad(sum(alone), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Checkpointed(Tiny):
    function = None

    def enable_gradient_checkpointing(self, function):
        self.function = function

    def forward(self, x, sigma):
        x = self.a(x) if self.function is None else self.function(self.a, x)
        return self.b(x.tanh())


def test_gradient_checkpointing_reaches_all_stages():
    torch.manual_seed(0)
    remix, (x, sigma) = wrap([Checkpointed(), Checkpointed()]), inputs()
    expected = torch.autograd.grad(remix(x, sigma).square().sum(), trained(remix))
    remix.enable_gradient_checkpointing()
    assert all(module.function for module in remix.stages.modules)
    found = torch.autograd.grad(remix(x, sigma).square().sum(), trained(remix))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_methods_of_the_module_reach_all_stages():
    class Named(Tiny):
        def rename(self, names):
            self.name = names.pop("name")

    torch.manual_seed(0)
    remix = wrap([Named(), Named()])
    for model, stages in ((remix, remix.stages.modules), (folded := FoldedRemix(remix), [folded.plain])):
        model.rename({"name": "new"})
        assert [stage.name for stage in stages] == ["new"] * len(stages)
    assert folded.other_stages[0].name == "new"


@torch.no_grad()
def test_batches_of_one_stage_and_of_several_are_compiled():
    remix, (x, sigma) = wrap(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(remix, backend="eager")
    for rows in ([1, 2, 4], [2, 4, 1], [0, 1, 3]):
        torch.testing.assert_close(compiled(x[rows], sigma[rows]), remix(x[rows], sigma[rows]))


# Levels on the boundary of stages


class Reference(nn.Module):
    """Returns the bias of its only mixed layer."""

    def __init__(self, value: float):
        super().__init__()
        self.a = nn.Linear(1, 1)
        self.a.bias.data.fill_(value)

    def forward(self, x, sigma):
        return self.a(torch.zeros_like(x))


@torch.no_grad()
def test_only_the_boundary_of_stages_is_compared_as_it_is(tmp_path):
    """A step that is rounded below a boundary of experts belongs to the expert above, but not to the stage above."""
    boundaries = [0, 300, 875, 900, 1000]
    options = dict(timestep="sigma", boundaries=boundaries, highest_level=1000, rank=1)
    remix = Remix([Reference(0), Reference(1)], ["a"], 2, stages=[0, 875, 1000], **options)
    folded = FoldedRemix(remix)
    write_experts(remix, tmp_path)
    below = {b: torch.nextafter(torch.tensor(float(b)), torch.tensor(0.0)).item() for b in boundaries[1:-1]}
    cases = [(b, torch.float32, i + 1) for i, b in enumerate(boundaries[1:-1])]
    cases += [(below[300], torch.float32, 1), (below[875], torch.float32, 1), (below[900], torch.float32, 3)]
    cases += [(872, torch.bfloat16, 1), (876, torch.bfloat16, 2), (896, torch.bfloat16, 2), (900, torch.bfloat16, 3)]
    cases += [(874, torch.long, 1), (875, torch.long, 2), (299, torch.long, 0), (300, torch.long, 1)]
    for level, dtype, expert in cases:
        t = torch.tensor([level], dtype=dtype)
        s = int(expert >= 2)
        assert remix.expert_index(t).tolist() == [expert], (level, dtype)
        assert remix.expert_index(t.item(), dtype) == expert
        assert (t.double() >= 875).item() == s
        assert remix(torch.zeros(1, 1), t).item() == folded(torch.zeros(1, 1), t).item() == s
        assert find_expert(tmp_path, t[0]) == f"expert{expert}.safetensors"


def test_folders_of_earlier_versions_are_read(tmp_path):
    write_experts(wrap(), tmp_path)
    index = (tmp_path / "experts.json").read_text()
    assert '"stages"' in index
    level = torch.nextafter(torch.tensor(0.2), torch.tensor(0.0))
    assert find_expert(tmp_path, level) == "expert1.safetensors"
    (tmp_path / "experts.json").write_text(index.replace('"stages"', '"exact": true, "ignored"'))
    assert find_expert(tmp_path, level) == "expert0.safetensors"


# What is trained, stored and moved


def test_only_the_shared_pairs_and_the_coefficients_are_trained():
    remix = wrap()
    expected = {"coefficients.logits"} | {f"pairs.{layer}.lora_{part}" for layer in "ab" for part in "AB"}
    assert {name for name, p in remix.named_parameters() if p.requires_grad} == expected
    remix.freeze_shared()
    assert {name for name, p in remix.named_parameters() if p.requires_grad} == expected
    for (_, first), (_, second) in zip(remix.mixed(0), remix.mixed(1), strict=True):
        assert first.lora_A is second.lora_A
        assert first.linear is not second.linear
    assert not any("lora" in name for s in (0, 1) for name, _ in remix.stages.module(s).named_parameters())
    distances, spread = remix.distances()
    assert distances.isfinite().all()
    assert spread > 0


@torch.no_grad()
def test_state_dicts_copies_and_pickles():
    remix, (x, sigma) = wrap(), inputs()
    expected = remix(x, sigma)
    names = {name for name, p in stored_parameters(remix).items() if p.requires_grad}
    assert names == {"logits"} | {f"pairs.{layer}.lora_{part}" for layer in "ab" for part in "AB"}
    twins = [copy.deepcopy(remix), pickle.loads(pickle.dumps(remix))]
    for state in (remix.state_dict(), stored_state(remix)):
        twins.append(Remix([Tiny(), Tiny()], **remix.mixing_config))
        twins[-1].load_state_dict(state)
    state = {key: value.clone() for key, value in remix.state_dict().items()}
    with torch.device("meta"):
        twins.append(Remix([Tiny(), Tiny()], **remix.mixing_config))
    twins[-1].load_state_dict(state, assign=True)
    for parameter in remix.parameters():
        parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(x, sigma), expected)


@torch.no_grad()
def test_a_stage_that_a_batch_does_not_need_is_not_touched():
    remix, (x, sigma) = wrap(), inputs()
    high = sigma >= 0.7
    expected, expert = remix(x[high], sigma[high]), remix.expert(3)
    remix.backbone = Fails()
    assert torch.equal(remix(x[high], sigma[high]), expected)
    assert torch.equal(remix(x[high], sigma[high], groups=3), expected)
    assert torch.equal(remix.expert(3).a.weight, expert.a.weight)
    with pytest.raises(AssertionError, match="not needed"):
        remix(x, sigma)


class Unmixed(Tiny):
    """Has a buffer that is not stored, and a layer with two names."""

    def __init__(self):
        super().__init__()
        self.again = self.a
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("shift", torch.randn(6), persistent=False)

    def forward(self, x, sigma):
        return super().forward(x, sigma) * self.scale + self.shift


@torch.no_grad()
def test_buffers_and_tied_layers_of_stages_are_folded_and_moved():
    torch.manual_seed(0)
    remix, (x, sigma) = wrap([Unmixed(), Unmixed()]), inputs()
    plain = remix.expert(0)
    remix.fold_(plain, 3)
    torch.testing.assert_close(plain(x[2:3], sigma[2:3]), remix(x[2:3], sigma[2:3]))
    folded = FoldedRemix(remix)
    remix.stages.activate(1, "meta")
    for s, module in enumerate((folded.plain, *folded.other_stages)):
        assert (module.shift.is_meta, module.scale.is_meta) == (s == 1, s == 1)


@torch.no_grad()
def test_stages_are_moved_and_the_pairs_stay():
    remix, (x, sigma) = wrap(), inputs()
    high = sigma >= 0.7
    expected = remix(x[high], sigma[high])
    remix.stages.module(0).to("meta")
    assert {p.device.type for p in remix.stages.module(1).parameters()} == {"cpu"}
    assert {p.device.type for p in trained(remix)} == {"cpu"}
    assert torch.equal(remix(x[high], sigma[high]), expected)
    for s, other in ((1, 0), (0, 1)):
        remix = wrap()
        remix.stages.activate(s, "meta")
        assert {p.device.type for p in remix.stages.module(other).parameters()} == {"cpu"}
        assert all(part.is_meta for part in (*trained(remix), *remix.stages.module(s).parameters()))


@torch.no_grad()
def test_a_stage_may_be_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    (x, sigma), plain, offloaded = inputs(), wrap(trained=False), wrap(trained=False)
    for (_, ours), (_, theirs) in zip(offloaded.mixed(), plain.mixed(), strict=True):
        for bases in (ours.bases(), theirs.bases()):
            torch.manual_seed(3)
            for basis in bases:
                nn.init.normal_(basis)
    offloaded.logits.data = plain.logits.data.clone()
    accelerate.cpu_offload(offloaded.stages.module(1), "cpu")
    assert all(p.is_meta for p in offloaded.stages.module(1).parameters())
    assert not any(p.is_meta for p in trained(offloaded))
    torch.testing.assert_close(offloaded(x, sigma), plain(x, sigma))
    for i in (0, 3):
        torch.testing.assert_close(offloaded.expert(i)(x, sigma), plain.expert(i)(x, sigma))


def test_stages_may_differ_in_their_dtype_and_quantization():
    """One stage is quantized: the pairs get the gradients of those over its dequantized weights."""
    first, second = (module.bfloat16() for module in modules(width=64))
    quantize(second, "torchao int8")
    remix, (x, sigma) = wrap([first, second]), inputs(64)
    remix(x.bfloat16(), sigma).float().square().sum().backward()
    reference = wrap([remix.expert(0), remix.expert(3)], trained=False)
    reference.load_state_dict({k: v for k, v in remix.state_dict().items() if k[:4] in ("pair", "coef")}, strict=False)
    for s in (0, 1):
        for (_, ours), (_, theirs) in zip(remix.mixed(s), reference.mixed(s), strict=True):
            theirs.linear.weight.data = dense_layer(ours.linear)[0].detach().clone()
    reference(x.bfloat16(), sigma).float().square().sum().backward()
    for ours, theirs in zip(trained(remix), trained(reference), strict=True):
        assert relative(ours.grad, theirs.grad) < 0.02


def test_half_precision_of_one_stage_leaves_the_pairs():
    first, second = modules()
    remix, (x, sigma) = wrap([first, second.bfloat16()]), inputs()
    assert {p.dtype for p in trained(remix)} == {torch.float32}
    out = remix(x[1:3].bfloat16(), sigma[1:3])
    assert out.dtype == torch.bfloat16
    assert relative(remix.expert(3)(x[2:3].bfloat16(), sigma[2:3]).float(), out[1:].float()) < 0.05


# Several processes


def test_two_processes_with_different_experts_give_the_gradients_of_one(tmp_path):
    """DDP with samples of other stages on each process, and FSDP2, which refuses them and writes the same files."""
    printed = run(ROOT / "tests" / "sharded_stages.py", tmp_path, processes=2).stdout
    assert "ddp passed" in printed
    assert "fsdp passed" in printed


# Merging, and wrong input


@torch.no_grad()
def test_experts_of_one_stage_are_merged():
    remix = wrap(mixer="raw")
    mean = remix.merge([0, 0, 1, 3])
    alpha = remix.coefficients()[2:] * torch.tensor([[0.25], [0.75]])
    layer = remix.mixed(1)[0][1]
    update = torch.einsum("k,kor,kri->oi", alpha.sum(0), layer.lora_B, layer.lora_A)
    torch.testing.assert_close(mean.a.weight, layer.weight + update)
    for weights in (None, [1, 0, 0, 1]):
        with pytest.raises(ValueError, match="experts of several stages cannot be merged: give weights of 0"):
            remix.merge(weights)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (None, dict(boundaries=[0, 0.2, 0.6, 1]), r"a stage ends at 0\.7, which is no boundary of the experts: 0, "),
        (None, dict(levels=None), "stages must be given for 2 modules"),
        (None, dict(levels=0.7), r"stages must be a list of noise levels, such as \[0, 875, 1000\], but it is 0\.7"),
        (None, dict(levels=[0, 0.5, 0.7, 1]), "got 2 modules and 4 noise levels"),
        (None, dict(levels=[0, 0.7, 2]), "stages must run from 0 to 1, but they run from 0 to 2"),
        (None, dict(rank=None), "stages needs rank"),
        (None, dict(boundaries=None, n_experts=1), "each of 2 stages needs an expert, but n_experts is 1"),
        ([Tiny(), Tiny(width=8)], {}, "module 1 differs from module 0 in its layout, such as a"),
        ([Tiny(), Frames()], {}, "module 0 is a Tiny, but 1 is a Frames"),
        ([tiny := Tiny(), tiny], {}, "one of them is given twice"),
        ([Tiny(), "high"], {}, "stages needs nn.Modules, such as a pipeline's transformers, but 1 is 'high'"),
        ([Tiny()], {}, "needs at least 2 modules"),
    ],
)
def test_what_cannot_be_stages_is_refused(stages, options, message):
    with pytest.raises(ValueError, match=message):
        wrap(stages, **options)


def test_one_module_has_no_stages():
    with pytest.raises(ValueError, match="stages needs a list of modules, but got one Tiny"):
        Remix(Tiny(), ["a"], 2, timestep="sigma", highest_level=1, rank=1, stages=STAGES)
