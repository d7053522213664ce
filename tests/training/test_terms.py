"""Terms of the loss: a term that is added in one place takes part in training, in the log and in metrics.jsonl."""

import json

import pytest
import torch
from conftest import make_trainer, random_microbatch, random_remix_dit, run, training_flags

from diffusion import create_diffusion, create_flow
from models import DiT_models
from runtime.processes import World
from training import terms
from training.batches import BatchSampler, Microbatch
from training.experts import experts_of
from training.settings import RunSettings
from training.terms import LossTerm, loss_terms
from training.trainer import TrainingLoss


def size_term(experts, settings) -> LossTerm:
    """A toy term: the mean square of the class embeddings, whose weight rises from 0 to 2."""
    return LossTerm(
        "size",
        weight=lambda progress: 2 * progress,
        value=lambda step: experts.backbone.y_embedder.embedding_table.weight.square().mean(),
    )


def test_a_term_is_a_part_of_the_loss_the_log_and_the_metrics(features, tmp_path, monkeypatch):
    monkeypatch.setattr(terms, "TERMS", [*terms.TERMS, size_term])
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=4", "--log-every=1", "--sample-every=0"]
    run("train_fast.py", *flags)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["size_weight"] for line in metrics] == [0.0, 0.5, 1.0, 1.5]
    assert [line["prior_weight"] for line in metrics] == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4])
    assert all(line["size"] > 0 for line in metrics)
    log = (tmp_path / "run/log.txt").read_text()
    assert all(f"  size {line['size']:.4f}  " in log for line in metrics)


@pytest.mark.parametrize("process", [create_diffusion(), create_flow()])
def test_the_loss_is_that_of_the_process_plus_the_weighted_terms(process):
    model = DiT_models["DiT-T/4"](input_size=8, num_classes=10)
    batch = random_microbatch()
    t = batch.t if process.name == "gaussian" else 1 - (batch.t + 0.5) / 1000
    batch = batch._replace(t=t, conditions={key: batch.conditions[key] for key in ("y", "label_drop")})
    plain, _ = TrainingLoss(model, process, [])(batch, ())
    loss = TrainingLoss(model, process, [size_term(experts_of(model), RunSettings())])
    total, means = loss(batch, (torch.tensor(0.5),))
    assert loss.names == (*process.loss_names, "size")
    assert total.item() == pytest.approx(plain.item() + 0.5 * means[-1].item())
    total.backward()
    assert model.y_embedder.embedding_table.weight.grad.abs().sum() > 0


def test_the_cosine_term_compares_velocities_over_the_channels():
    """A network of the exact velocity has none; the similarity of a known angle is its cosine; variance is ignored."""
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = x - noise
    # At each position: orthogonal to the velocity, and as long.
    other = torch.cat([-velocity[:, 1:2], velocity[:, :1], -velocity[:, 3:], velocity[:, 2:3]], dim=1)
    angle = torch.tensor(0.7)
    settings = RunSettings(cosine_weight=0.5)
    for out, expected in ((3 * velocity, 0.0), (angle.cos() * velocity + angle.sin() * other, 1 - angle.cos().item())):
        model = DiT_models["DiT-T/4"](input_size=8, num_classes=10)
        model.forward = lambda *args, out=out, **kwargs: torch.cat([out, out], dim=1)
        (term,) = loss_terms(experts_of(model), settings)
        batch = Microbatch(x, torch.tensor([0.1, 0.5, 0.9]), {}, noise, {})
        total, means = TrainingLoss(model, create_flow(), [term])(batch, (torch.tensor(term.weight(0.3)),))
        assert means[1].item() == pytest.approx(expected, abs=1e-6)
        assert total.item() == pytest.approx(means[0].item() + 0.5 * expected, abs=1e-6)


def test_a_term_gets_the_further_tensors_of_its_microbatch(monkeypatch):
    """For example features of another network, which the dataset returns beside the images."""
    seen = []
    term = LossTerm("mean", lambda progress: 1.0, lambda step: seen.append(step.extras["z"]) or step.extras["z"].mean())
    monkeypatch.setattr(terms, "TERMS", [lambda experts, settings: term])
    world = World(0, 1, torch.device("cpu"))
    sampler = BatchSampler(0, 8, world, n_experts=20, experts_per_batch=4, grad_accum=2)
    z = torch.arange(8.0)
    batch = sampler.draw(0, torch.randn(8, 4, 8, 8), torch.arange(8), {"z": z})
    trainer = make_trainer(random_remix_dit(depth=1), grad_accum=2)
    trainer.step(0, sampler.microbatches(batch))
    assert [part.tolist() for part in seen] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert trainer.stats.read()[0]["mean"] == z.mean()


def test_models_without_trained_logits_have_no_prior():
    settings = RunSettings()
    assert [term.name for term in loss_terms(experts_of(random_remix_dit()), settings)] == ["prior"]
    assert loss_terms(experts_of(DiT_models["DiT-T/4"]()), settings) == []
