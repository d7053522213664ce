"""One learning rate per stage."""

import math

import pytest
import torch
from torch import nn

from mixing.stage_rates import set_stage_rates
from remix import Remix


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, sigma):
        return self.layer(x)


def make() -> Remix:
    torch.manual_seed(0)
    remix = Remix(
        [Denoiser(), Denoiser()],
        ["layer"],
        2,
        boundaries=[0, 0.2, 0.5, 1],
        stages=[0, 0.5, 1],
        rank=2,
        timestep="sigma",
    )
    for _, layer in remix.mixed():
        nn.init.normal_(layer.lora_B)
    nn.init.normal_(remix.logits)
    remix.freeze_shared()
    return remix


def steps(factors, kind, **settings) -> list[list[torch.Tensor]]:
    """The changes of the logits and of B in each of two steps, the second with half the learning rate."""
    remix = make()
    watched = remix.logits, remix.mixed()[0][1].lora_B
    optimizer = kind([p for p in remix.parameters() if p.requires_grad], lr=0.1, **settings)
    if factors:
        set_stage_rates(optimizer, remix, factors)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x, sigma = torch.randn(6, 4), torch.tensor([0.1, 0.1, 0.3, 0.3, 0.7, 0.7])
    changes = []
    for _ in range(2):
        before = [parameter.detach().clone() for parameter in watched]
        optimizer.zero_grad()
        (remix(x, sigma) - 1).square().mean().backward()
        optimizer.step()
        schedule.step()
        changes.append([parameter.detach() - old for parameter, old in zip(watched, before, strict=True)])
    return changes


@pytest.mark.parametrize(
    ("kind", "settings"), [(torch.optim.AdamW, dict(weight_decay=0.1)), (torch.optim.SGD, dict(momentum=0.9))]
)
def test_a_stages_factor_multiplies_the_steps_of_its_rows(kind, settings):
    (plain, plain_b), _ = steps(None, kind, **settings)
    (scaled, scaled_b), second = steps([0.25, 1.0], kind, **settings)
    assert plain.abs().min() > 0
    torch.testing.assert_close(scaled[:2], 0.25 * plain[:2], rtol=1e-3, atol=1e-7)
    assert torch.equal(scaled[2], plain[2])
    assert torch.equal(scaled_b, plain_b)
    # The schedule applies too.
    if kind is torch.optim.AdamW:
        assert second[0][:2].abs().max() < 0.6 * scaled[:2].abs().max()
    assert (steps([0.0, 1.0], kind, **settings)[1][0][:2] == 0).all()


def test_wrong_factors_are_refused():
    remix = make()
    optimizer = torch.optim.SGD([remix.logits])
    for factors in ([1.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="expected 2 finite factors of at least 0, one per stage"):
            set_stage_rates(optimizer, remix, factors)
    with pytest.raises(ValueError, match="does not train the logits"):
        set_stage_rates(torch.optim.SGD(remix.mixed()[0][1].bases()), remix, [1.0, 1.0])
    for handle in set_stage_rates(optimizer, remix, [0.0, 1.0]):
        handle.remove()
    remix.logits.grad = torch.ones_like(remix.logits)
    before = remix.logits.detach().clone()
    optimizer.step()
    assert (remix.logits != before).all()
