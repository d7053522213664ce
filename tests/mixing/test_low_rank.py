"""Low-rank bases: every expert is a linear layer plus a weighted sum of K pairs of small matrices."""

import copy

import pytest
import torch
from conftest import FEW_SAMPLES, random_remix_dit, relative, run, training_flags
from torch import nn

from checkpoint import load_model
from convert import whole_bases
from mixing.coefficients import BatchCoefficients
from mixing.low_rank import LowRankLinear
from mixing.options import MIXERS
from models import DiT
from remix import RemixDiT, RemixLinear
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
    x = torch.randn(6, 7, 5, dtype=torch.float64)
    parameters = [coefficients.alpha, *layer.parameters()]
    fast = torch.autograd.grad(layer(x).square().sum(), parameters)
    theta = layer.weight + torch.einsum("gk,kor,kri->goi", coefficients.alpha[0], layer.lora_B, layer.lora_A)
    out = torch.einsum("gbti,goi->gbto", x.view(3, 2, 7, 5), theta) + layer.bias
    for a, b in zip(fast, torch.autograd.grad(out.square().sum(), parameters), strict=True):
        torch.testing.assert_close(a, b)


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


def test_copies_share_no_parameters():
    model = random_low_rank()
    other = copy.deepcopy(model)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in other.parameters()}
    assert not ours & {p.data_ptr() for p in model.expert(3).parameters()}
