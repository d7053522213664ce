"""Low-rank bases: every expert is a linear layer plus a weighted sum of K pairs of small matrices."""

import copy

import pytest
import torch
from conftest import FEW_SAMPLES, random_remix_dit, relative, run, training_flags
from torch import nn

from checkpoint import load_model
from convert import whole_bases
from mixing.coefficients import BatchCoefficients
from mixing.experts import stored_parameters, stored_state
from mixing.low_rank import LowRankLinear, dense_layer
from mixing.options import MIXERS
from models import DiT
from remix import Remix, RemixDiT, RemixLinear
from sampling.experts import FoldedRemix


def random_dit() -> DiT:
    torch.manual_seed(0)
    dit = DiT(8, 2, 4, 32, 2, 2, num_classes=10)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return dit.eval()


def random_low_rank(rank: int = 3, **options) -> RemixDiT:
    """A RemixDiT with K = 4 random pairs per layer and N = 20."""
    model = RemixDiT(random_dit(), 4, 20, rank=rank, **options)
    for _, layer in model.mixed():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model.eval()


def batch(t: list[int]) -> tuple[torch.Tensor, ...]:
    x = torch.randn(len(t), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor(t), torch.arange(len(t))


def test_experts_start_as_the_model():
    dit = random_dit()
    x, t, y = batch([0, 400, 999])
    with torch.no_grad():
        assert torch.equal(RemixDiT(dit, 4, 20, rank=3)(x, t, y, groups=3), dit(x, t, y))


def test_the_coefficients_get_a_gradient_from_the_second_step_on():
    model = RemixDiT(random_dit(), 4, 20, rank=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        model(*batch([0, 400, 999])).square().mean().backward()
        gradients.append(model.logits.grad.clone())
        optimizer.step()
    assert not gradients[0].any()
    assert gradients[1].any()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("scope", ["global", "local"])
@torch.no_grad()
def test_mixed_batches_groups_and_folded_experts_agree(mixer, scope):
    model = random_low_rank(mixer=mixer, scope=scope)
    x, t, y = batch([0, 20, 400, 410, 990, 999])
    expected = torch.cat([model.expert(i)(*(v[j : j + 2] for v in (x, t, y))) for j, i in ((0, 0), (2, 8), (4, 19))])
    folded = FoldedRemix(model)
    for out in (
        model(x, t, y),
        model(x, t, y, groups=3),
        torch.cat([folded(*(v[j : j + 2] for v in (x, t, y))) for j in (0, 2, 4)]),
    ):
        assert relative(out, expected) < 1e-5
    assert relative(random_dit()(x, t, y), expected) > 1e-2, "the pairs of this test must have an effect"


@pytest.mark.parametrize("mixer", ["softmax", "one-hot"])
@torch.no_grad()
def test_pairs_of_full_rank_can_be_any_bases(mixer):
    """The dense bases' function and low rank at full rank are the same if the biases are equal."""
    dense = random_remix_dit().eval() if mixer == "softmax" else RemixDiT(random_dit(), 4, 20, mixer=mixer).eval()
    for _, layer in dense.mixed():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
    low_rank = RemixDiT(random_dit(), 4, 20, mixer=mixer, rank=32)
    low_rank.logits.copy_(dense.logits)
    shared = {key: value for key, value in dense.state_dict().items() if ".attn." not in key and ".mlp." not in key}
    low_rank.load_state_dict(shared, strict=False)
    for (_, wide), (_, layer) in zip(dense.mixed(), low_rank.mixed(), strict=True):
        layer.bias.copy_(wide.bias[0])
        u, s, v = torch.linalg.svd(wide.weight - layer.weight, full_matrices=False)  # ranks of at most 32
        layer.lora_B.copy_(u * s[:, None])
        layer.lora_A.copy_(v)
    x, t, y = batch([0, 20, 400, 410, 990, 999])
    assert relative(low_rank(x, t, y), dense(x, t, y)) < 1e-4


@torch.no_grad()
def test_low_rank_bases_become_whole_bases():
    model = random_low_rank()
    whole = whole_bases(model, "original")
    x, t, y = batch([0, 20, 400, 410, 990, 999])
    assert isinstance(whole.mixed()[0][1], RemixLinear)
    assert relative(whole(x, t, y), model(x, t, y)) < 1e-5
    # Distances are defined by the bases, however they are stored.
    for ours, theirs in zip(model.distances(), whole.distances(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_whole_matrices():
    torch.manual_seed(0)

    coefficients = BatchCoefficients()
    coefficients.alpha = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = LowRankLinear(nn.Linear(5, 6, dtype=torch.float64), 4, 2, coefficients)
    nn.init.normal_(layer.lora_B)
    coefficients.samples = x = torch.randn(6, 7, 5, dtype=torch.float64)
    parameters = [coefficients.alpha, *layer.parameters()]
    fast = torch.autograd.grad(layer(x).square().sum(), parameters)
    theta = layer.weight + torch.einsum("gk,kor,kri->goi", coefficients.alpha[0], layer.lora_B, layer.lora_A)
    out = torch.einsum("gbti,goi->gbto", x.view(3, 2, 7, 5), theta) + layer.bias
    for a, b in zip(fast, torch.autograd.grad(out.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)


class Scaled(nn.Linear):
    """A linear layer that computes something else than `nn.Linear`."""

    def forward(self, x):
        return 2 * super().forward(x)


class Tiny(nn.Module):
    """Two linear layers; the noise level is `sigma`."""

    def __init__(self, linear: type = nn.Linear, width: int = 6):
        super().__init__()
        self.a, self.b = linear(width, 2 * width), linear(2 * width, width)

    def forward(self, x, sigma):
        return self.b(self.a(x).tanh())


def wrap(module: nn.Module, **options) -> Remix:
    """A Remix of rank 2 with random pairs, K = 2 and N = 4."""
    torch.manual_seed(0)
    options = dict(n_basis=2, n_experts=4, timestep="sigma", highest_level=1, rank=2) | options
    remix = Remix(module, ["a", "b"], **options)
    for _, layer in remix.mixed():
        nn.init.normal_(layer.lora_B, std=0.3)
    return remix


SIGMA = torch.tensor([0.9, 0.1, 0.6, 0.3])


def one_by_one(remix: Remix, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([remix(x[i : i + 1], SIGMA[i : i + 1]) for i in range(4)])


# One pass for a batch of several experts


class Frames(Tiny):
    """Its layers see frames, of which those of one sample are neighbours or not, or one row of all tokens."""

    def __init__(self, order: str):
        super().__init__()
        self.order = order

    def forward(self, x, sigma):
        batch, frames = x.shape[:2]
        if self.order == "tokens":
            rows = x.view(1, -1, 6)
        else:
            rows = (x.transpose(0, 1) if self.order == "frames first" else x).reshape(batch * frames, *x.shape[2:])
        rows = super().forward(rows, sigma)
        if self.order == "frames first":
            return rows.view(frames, batch, *x.shape[2:]).transpose(0, 1)
        return rows.view(x.shape)


@pytest.mark.parametrize("order", ["samples first", "frames first", "tokens"])
@torch.no_grad()
def test_layers_with_other_rows_than_the_samples_get_the_right_expert_or_are_refused(order):
    remix, x = wrap(Frames(order)), torch.randn(4, 3, 2, 6)
    torch.testing.assert_close(remix(x, SIGMA), one_by_one(remix, x))
    assert not remix.runs_at_once
    if order == "tokens":
        with pytest.raises(ValueError, match=r"first dimension of a mixed layer's input \[1, 24, 6\] is not the batch"):
            remix(x, SIGMA, groups=4)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"is not the batch of 4 samples|RowsError"):
        torch.compile(wrap(Frames(order)), backend="eager", fullgraph=True)(x, SIGMA)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_batch_of_any_experts_is_one_call_and_one_graph(scope):
    remix, x = wrap(Tiny(), scope=scope), torch.randn(4, 5, 6)
    calls = []
    remix.backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    expected = one_by_one(remix, x)
    parameters = [p for p in remix.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    calls.clear()
    out = remix(x, SIGMA)
    assert calls == [4]
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(remix, backend="aot_eager", fullgraph=True)(x, SIGMA)
    torch.testing.assert_close(compiled, expected)


# The layer that is kept


@torch.no_grad()
def test_subclasses_of_linear_layers_are_called_and_folded():
    remix, x = wrap(Tiny(Scaled)), torch.randn(4, 5, 6)
    called = []
    remix.backbone.a.linear.register_forward_hook(lambda *_: called.append("a"))
    layer, alpha = remix.backbone.a, remix.coefficients()[remix.expert_index(SIGMA)]
    theta = 2 * layer.weight + torch.einsum("bk,kor,kri->boi", alpha, layer.lora_B, layer.lora_A)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    out = remix(x, SIGMA)
    assert called == ["a"]
    torch.testing.assert_close(seen[0], torch.einsum("bti,boi->bto", x, theta) + 2 * layer.bias)
    for i, expert in enumerate((3, 0, 2, 1)):
        plain = remix.expert(expert)
        assert type(plain.a) is nn.Linear
        torch.testing.assert_close(plain(x[i : i + 1], SIGMA), out[i : i + 1])
    assert remix.distances()[0].isfinite().all()

    class Clipped(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(min=0)

    with pytest.raises(ValueError, match=r"a Clipped is not linear in its input: its experts cannot be folded"):
        wrap(Tiny(Clipped)).expert(0)


def normalize(module: Tiny):
    """The old weight normalization: a hook computes the weight from two parameters, which are loaded here."""
    nn.utils.weight_norm(module.a)
    module.a.weight_g.data *= 2


def double(module: Tiny):
    module.a.register_forward_hook(lambda layer, args, out: 2 * out)


def patch(module: Tiny):
    forward = module.a.forward
    module.a.forward = lambda x: 2 * forward(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [normalize, double, patch])
@torch.no_grad()
def test_what_hooks_of_a_layer_do_is_folded_or_refused(change):
    x, module = torch.randn(4, 5, 6), Tiny()
    change(module)
    with pytest.raises(ValueError, match=r"layers: a has hooks or a forward of its own, .* remove them, or give rank"):
        wrap(module, rank=None)
    remix = wrap(module)
    experts = [remix.expert(i) for i in range(4)]
    out = remix(x, SIGMA)
    for i, expert in enumerate((3, 0, 2, 1)):
        torch.testing.assert_close(experts[expert](x[i : i + 1], SIGMA), out[i : i + 1])
    # Also a change of a few roundings.
    layer = nn.Linear(64, 64).bfloat16()
    layer.register_forward_hook(lambda layer, args, out: 1.03 * out)
    assert not torch.equal(dense_layer(layer)[0], layer.weight)
    # Hooks that change nothing leave the weights exactly as they are.
    remix.backbone.b.linear.register_forward_hook(lambda *_: None)
    assert torch.equal(dense_layer(remix.backbone.b.linear)[0], remix.backbone.b.weight)


@torch.no_grad()
def test_layerwise_casting_reaches_the_kept_layers_before_and_after_wrapping():
    from diffusers.hooks import apply_layerwise_casting

    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        x, outputs = torch.randn(4, 5, 6, dtype=dtype), []
        for before in (False, True):
            torch.manual_seed(1)
            module = Tiny()
            remix = module if before else wrap(module)
            apply_layerwise_casting(remix, torch.float8_e4m3fn, dtype)
            remix = wrap(module) if before else remix
            assert remix.backbone.a.weight.dtype == torch.float8_e4m3fn
            assert remix.backbone.a.lora_A.dtype == torch.float32
            outputs.append(remix(x, SIGMA))
            for i, expert in enumerate((3, 0, 2, 1)):
                out = remix.expert(expert)(x[i : i + 1], SIGMA)
                torch.testing.assert_close(out, outputs[-1][i : i + 1], rtol=error, atol=error)
            assert remix.distances()[1] > 0
        assert torch.equal(*outputs)
    with pytest.raises(AttributeError, match="whole bases are not cast by layers"):
        wrap_whole().enable_layerwise_casting()


def test_experts_that_were_selected_in_inference_mode_have_gradients():
    folded, x = FoldedRemix(wrap(Tiny())), torch.randn(1, 5, 6, requires_grad=True)
    with torch.inference_mode():
        expected = folded(x, SIGMA[:1])
    out = folded(x, SIGMA[:1])
    torch.testing.assert_close(out, expected)
    assert torch.autograd.grad(out.sum(), x)[0].norm() > 0


@torch.no_grad()
def test_layers_that_accelerate_offloads_are_called_and_folded():
    accelerate = pytest.importorskip("accelerate")
    x, remixes = torch.randn(4, 5, 6), []
    for offloaded in (False, True):
        torch.manual_seed(1)
        module = Tiny()
        if offloaded:
            accelerate.cpu_offload(module, "cpu")
            assert module.a.weight.is_meta
        remixes.append(wrap(module))
    plain, remix = remixes
    assert remix.backbone.a.weight.is_meta
    torch.testing.assert_close(remix(x, SIGMA), plain(x, SIGMA))
    torch.testing.assert_close(remix.expert(2)(x, SIGMA), plain.expert(2)(x, SIGMA))


def wrap_whole() -> Remix:
    return Remix(Tiny(), ["a", "b"], 2, 4, timestep="sigma", highest_level=1)


def quantize(module: nn.Module, kind: str):
    """Quantize the linear layers of a module in bf16, in place. Skips the test if the library is missing."""
    if kind.startswith("torchao"):
        library = pytest.importorskip("torchao.quantization")
        config = library.Int8WeightOnlyConfig if kind.endswith("int8") else library.Float8WeightOnlyConfig
        library.quantize_(module, config())
    elif kind == "quanto int8":
        library = pytest.importorskip("optimum.quanto")
        library.quantize(module, weights=library.qint8)
        library.freeze(module)
    else:
        library = pytest.importorskip("bitsandbytes")
        for name, layer in [*module.named_modules()]:
            if type(layer) is nn.Linear:
                options = dict(bias=layer.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4")
                quantized = library.nn.Linear4bit(layer.in_features, layer.out_features, **options)
                quantized.weight = library.nn.Params4bit(layer.weight.data, False, quant_type="nf4")._quantize("cpu")
                quantized.bias = layer.bias
                module.set_submodule(name, quantized)


def stored_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, or of the tensors that it consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["torchao int8", "torchao fp8", "quanto int8", "bitsandbytes nf4"])
def test_quantized_layers_are_kept(kind, after, tmp_path):
    """Quantized before or after wrapping, the pairs get the gradients of those over the dequantized weights."""

    def build(quantized: bool) -> Remix:
        torch.manual_seed(1)
        module = Tiny(width=64).bfloat16().requires_grad_(False)
        if quantized and not after:
            quantize(module, kind)
        remix = wrap(module)
        if quantized and after:
            quantize(module, kind)
        remix.freeze_shared()
        return remix

    remix, reference, x = build(True), build(False), torch.randn(4, 5, 64).bfloat16()
    for (_, layer), (_, plain) in zip(remix.mixed(), reference.mixed(), strict=True):
        whole = plain.weight.nbytes
        assert stored_bytes(layer.weight) <= 0.55 * whole
        dense = dense_layer(layer.linear)[0]
        assert 0 < relative(dense.float(), plain.weight.float()) < 0.2
        plain.weight.data = dense.detach().clone()
    for model in (remix, reference):
        model(x, SIGMA).float().square().sum().backward()
    for (name, ours), (_, theirs) in zip(trained(remix), trained(reference), strict=True):
        assert relative(ours.grad, theirs.grad) < 0.02, name
        assert theirs.grad.any(), name
    for i, expert in enumerate((3, 0, 2, 1)):
        plain, folded = (model.expert(expert) for model in (remix, reference))
        assert plain.a.weight.dtype == torch.bfloat16
        assert torch.equal(plain.a.weight, folded.a.weight)
        one = x[i : i + 1], SIGMA[i : i + 1]
        assert relative(plain(*one).float(), remix(*one).float()) < 0.02
    assert all(distance.isfinite().all() for distance in remix.distances())


@torch.no_grad()
def test_a_folded_remix_is_not_quantized():
    """Libraries replace the layers that are `nn.Linear`s, or their weights."""
    message = "the layer a of a FoldedRemix was replaced or quantized, so no expert can be written into it: quantize a"
    folded, x = FoldedRemix(wrap(Tiny())), torch.randn(1, 5, 6)
    folded.plain.a = nn.Linear(6, 12)
    with pytest.raises(ValueError, match=message):
        folded(x, SIGMA[:1])
    folded = FoldedRemix(wrap_whole())
    folded.plain.a.weight = nn.Parameter(folded.plain.a.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        folded(x, SIGMA[:1])


@pytest.mark.parametrize("kind", ["quanto int8", "torchao int8"])
@torch.no_grad()
def test_a_folded_remix_of_quantized_layers_equals_the_remix(kind):
    module, x = Tiny(width=64).bfloat16().requires_grad_(False), torch.randn(4, 5, 64).bfloat16()
    remix = wrap(module)
    folded = FoldedRemix(remix)
    quantize(remix, kind)
    outputs = torch.cat([folded(x[i : i + 1], SIGMA[i : i + 1]) for i in range(4)])
    assert relative(outputs.float(), remix(x, SIGMA).float()) < 0.01
    assert stored_bytes(folded.plain.a.weight) <= 0.55 * 64 * 128 * 2
    folded = FoldedRemix(wrap_whole())
    quantize(folded, kind)
    with pytest.raises(ValueError, match="of a FoldedRemix was replaced or quantized"):
        folded(x[:1, :, :6], SIGMA[:1])


def trained(remix: Remix) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in remix.named_parameters() if p.requires_grad]


def test_layers_that_cannot_be_kept_are_refused():
    module = nn.Module()
    module.forward = lambda x, sigma: x
    module.attention, module.norm = nn.MultiheadAttention(6, 2), nn.LayerNorm(6)
    options = dict(n_basis=2, n_experts=2, timestep="sigma", highest_level=1)
    with pytest.raises(ValueError, match=r"layers: norm is a .*LayerNorm, but must be an nn\.Linear$"):
        Remix(module, ["norm"], **options, rank=2)
    with pytest.raises(ValueError, match=r"attention.out_proj is in an nn.MultiheadAttention, which reads its weight"):
        Remix(module, ["attention.out_proj"], **options, rank=2)
    with pytest.raises(ValueError, match=r"a is a .*Scaled, but must be an nn\.Linear; with rank, subclasses can"):
        wrap(Tiny(Scaled), rank=None)


def test_only_bases_and_coefficients_are_trained_with_frozen_shared_parameters():
    model = RemixDiT(random_dit(), 4, 20, rank=3)
    model.freeze_shared()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "logits"}
    dense = RemixDiT(random_dit(), 4, 20, mixer="one-hot")
    dense.freeze_shared()
    trained = {name.rpartition(".")[0] for name, p in dense.named_parameters() if p.requires_grad}
    assert trained == {f"backbone.{name}" for name, _ in dense.mixed()}


@pytest.mark.parametrize("freeze", [False, True])
def test_training_and_sampling_with_low_rank_bases(features, ckpt, tmp_path, freeze):
    start = tmp_path / "start.pt"
    remix, _ = load_model(ckpt)
    torch.save(remix.expert(0).state_dict(), start)
    words = training_flags(features, tmp_path, "low") + [
        "--n-experts=4",
        "--rank=2",
        f"--load-weight={start}",
        "--max-steps=3",
    ]
    run("train_fast.py", *words, *(["--freeze"] if freeze else []))
    path = tmp_path / "low" / "checkpoints" / "0000003.pt"
    model, _ = load_model(path, ema=False)
    assert model.rank == 2
    same = torch.equal(model.backbone.final_layer.linear.weight, torch.load(start)["final_layer.linear.weight"])
    assert same == freeze
    run("sample_ddp.py", "--ckpt", path, *FEW_SAMPLES, "--sample-dir", tmp_path, "--name", "samples")
    assert (tmp_path / "samples" / "samples.npz").exists()
    run("convert.py", path, tmp_path / "original.pt", "--to", "original")
    assert load_model(tmp_path / "original.pt")[0].rank is None


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("DiT-T/2", ["--rank=2"], "--rank needs a RemixDiT"),
        ("RemixDiT-T/2", ["--freeze"], "--freeze needs --load-weight"),
    ],
)
def test_wrong_flags(features, tmp_path, model, words, message):
    done = run("train_fast.py", *training_flags(features, tmp_path, "wrong", model), *words, expect=2)
    assert message in done.stderr


@pytest.mark.parametrize("rank", [None, 2])
@torch.no_grad()
def test_checkpoints_keep_their_names_and_the_order_of_their_parameters(rank):
    """Before the linear layers and the logits were parts of submodules, they had the names that checkpoints have."""
    model = RemixDiT(random_dit(), 4, 20, rank=rank)
    layer, parts = "backbone.blocks.0.attn.qkv", ("weight", "bias") + (("lora_A", "lora_B") if rank else ())
    state, parameters = stored_state(model), stored_parameters(model)
    names = [*parameters]
    assert names[0] == "logits"
    first = names.index(f"{layer}.weight")
    assert names[first : first + len(parts)] == [f"{layer}.{part}" for part in parts]
    assert {*parameters} <= {*state}
    assert all(torch.equal(parameter, state[name]) for name, parameter in parameters.items())
    other = RemixDiT(random_dit(), 4, 20, rank=rank)
    for parameter in model.parameters():
        parameter.add_(1)
    for names in (stored_state(model), model.state_dict()):
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(names)
        assert all(torch.equal(*pair) for pair in zip(other.parameters(), model.parameters(), strict=True))


@torch.no_grad()
def test_coefficients_are_float32_or_refused():
    remix = wrap(Tiny())
    remix.bfloat16()
    assert remix.backbone.a.weight.dtype == torch.bfloat16
    assert remix.coefficients().dtype == remix.logits.dtype == torch.float32
    remix.coefficients.logits.data = remix.logits.data.bfloat16()
    with pytest.raises(
        TypeError, match=r"must be float32, but their logits were cast to torch\.bfloat16: apply mixing\.f"
    ):
        remix.coefficients()


@torch.no_grad()
def test_a_folded_remix_of_low_rank_bases_has_no_second_copy_of_the_weights():
    def storages(tensors) -> dict[int, int]:
        return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}

    remix, x = wrap(Tiny(width=64)), torch.randn(4, 5, 64)
    folded = FoldedRemix(remix)
    outputs = [folded(x[i : i + 1], SIGMA[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(outputs), remix(x, SIGMA))
    pairs = sum(layer.lora_B.nbytes for _, layer in remix.mixed())
    own = sum(storages(remix.parameters()).values())
    everything = storages([*folded.parameters(), *folded.buffers()])
    for buffer in remix.buffers():
        everything.pop(buffer.untyped_storage().data_ptr(), None)
    assert sum(everything.values()) <= own + pairs
    # Conversions reach the shared weights once.
    folded.bfloat16()
    assert folded.plain.a.weight is remix.backbone.a.linear.weight
    assert folded.plain.a.weight.dtype == folded.plain.a.b.dtype == torch.bfloat16
    assert relative(folded(x[:1].bfloat16(), SIGMA[:1]).float(), outputs[0]) < 0.05


def test_copies_share_no_parameters():
    model = random_low_rank()
    other = copy.deepcopy(model)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in other.parameters()}
    assert not ours & {p.data_ptr() for p in model.expert(3).parameters()}
