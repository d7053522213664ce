"""A checkpoint of an earlier version resumes as the same run: the same random draws and the same weights."""

import pytest
import torch
from conftest import GOLDEN, run

from training.trainer import Trainer

RESUME = GOLDEN / "resume"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The microbatches of steps 5 to 9, and the weights after them."""
    results = tmp_path_factory.mktemp("resumed")
    microbatches, train_one_step = {}, Trainer.step

    def record(self, step, batch, prior_weight):
        microbatches[step] = list(batch)
        train_one_step(self, step, microbatches[step], prior_weight)

    flags = [f"--data-path={RESUME / 'features'}", f"--results-dir={results}", f"--resume={RESUME / '0000005.pt'}"]
    flags += ["--model=RemixDiT-T/4", "--n-basis=2", "--n-experts=6", "--global-batch-size=12", "--experts-per-batch=3"]
    flags += ["--grad-accum=2", "--max-steps=10", "--ckpt-every=5", "--log-every=1", "--lr=1e-3", "--ema-decay=0.9"]
    flags += ["--num-workers=0", "--sample-every=0", "--precision=fp32", "--no-compile", "--prefix=run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", record)
        run("train_fast.py", *flags)
    return microbatches, torch.load(results / "run/checkpoints/0000010.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def expected():
    return torch.load(RESUME / "expected.pt", weights_only=True)


def test_a_resumed_run_makes_the_same_draws_as_before(resumed, expected):
    """Images with views and posterior draws (x), timesteps, labels, label dropout, groups and noise, bit for bit."""
    microbatches, _ = resumed
    assert microbatches.keys() == expected["draws"].keys()
    for step, draws in expected["draws"].items():
        x, t, conditions, noise = zip(*microbatches[step], strict=True)
        assert [part["groups"] for part in conditions] == draws["groups"]
        now = {"x": x, "t": t, "noise": noise}
        now |= {name: [part[name] for part in conditions] for name in ("y", "label_drop")}
        for name, parts in now.items():
            assert torch.equal(torch.cat(parts), draws[name]), f"{name} of step {step}"


def test_a_resumed_run_reaches_the_same_weights_as_before(resumed, expected):
    _, weights = resumed
    assert weights.keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)
