"""Guidance: its scales over the noise levels, the network evaluations it needs, and samples with a closed form."""

import json

import numpy as np
import pytest
import torch
from conftest import FEW_SAMPLES, check_sampling_refused, random_remix_dit, run, sampled_images

from diffusion import create_flow
from models import DiT_models
from sampling.experts import FoldedRemix
from sampling.guidance import GuidedDenoiser, autoguidance, make_schedule, parse_pieces


@pytest.mark.parametrize(
    ("scale", "interval", "highest", "boundaries", "scales"),
    [
        (1.5, None, 1000, [0, 1000], [1.5]),
        (1.5, [0, 1000], 1000, [0, 1000], [1.5]),
        (2.0, [200, 800], 1000, [0, 200, 800, 1000], [1, 2, 1]),
        ("3@200:1000,1.5@0:200", None, 1000, [0, 200, 1000], [1.5, 3]),
        ("2@0.1:0.2,3@0.5:1", [0.15, 0.6], 1, [0, 0.15, 0.2, 0.5, 0.6, 1], [1, 2, 1, 3, 1]),
    ],
)
def test_schedules(scale, interval, highest, boundaries, scales):
    schedule = make_schedule(scale, interval, highest)
    assert (schedule.boundaries, schedule.scales) == (boundaries, scales)
    assert schedule.guides


@pytest.mark.parametrize(
    ("scale", "interval", "highest"),
    [(2.0, [500, 400], 1000), (2.0, [0, 2], 1), ("2@0:300,3@200:400", None, 1000), ("2@0:300", None, 1)],
)
def test_wrong_intervals(scale, interval, highest):
    with pytest.raises(ValueError, match="is not an interval of the"):
        make_schedule(scale, interval, highest)


@pytest.mark.parametrize("text", ["2@", "@0:1", "-1@0:1", "nan@0:1", "2@0:1,", "2@0:inf"])
def test_wrong_scales(text):
    with pytest.raises(ValueError):
        parse_pieces(text)


def test_an_interval_holds_its_lowest_level_and_not_its_highest():
    timesteps = make_schedule(2.0, [200, 800], 1000)
    assert [timesteps.scale_at(t) for t in (0, 199, 200, 799, 800, 999)] == [1, 1, 2, 2, 1, 1]
    # The noise level of a flow is 1 - t. A step at a boundary belongs to the interval above it, however t is rounded.
    flow = make_schedule(2.0, [0.15, 0.7], 1)
    assert [flow.scale_at(float(np.float32(t))) for t in (1.0, 0.86, 0.85, 0.31, 0.3, 0.0)] == [1, 1, 2, 2, 1, 1]


def test_a_closed_interval_holds_both_of_its_ends():
    flow = make_schedule(2.0, [0.15, 0.7], 1, closed=True)
    times = (1.0, 0.86, 0.85, 0.31, 0.3, 0.299, 0.0)
    assert [flow.scale_at(float(np.float32(t))) for t in times] == [1, 1, 2, 2, 2, 1, 1]
    assert make_schedule(2.0, [0, 1], 1, closed=True) == make_schedule(2.0, [0, 1], 1)


def test_steps_without_guidance_run_half_the_batch():
    sizes = []

    def network(x, t, y):
        sizes.append(len(x))
        return torch.cat([x, x], dim=1)

    schedule = make_schedule(2.0, [200, 801], 1000)
    denoise = GuidedDenoiser(network, torch.zeros(3, dtype=torch.long), 10, schedule)
    for time in (900, 800, 500, 200, 100):
        denoise(torch.randn(3, 4, 2, 2), time)
    assert sizes == [3, 6, 6, 6, 3]


@pytest.mark.parametrize("guide", [False, True])
@torch.no_grad()
def test_the_time_of_a_call_selects_its_expert_in_any_order(guide, monkeypatch):
    """No order of times is agreed beforehand: a time that comes twice or too early runs the expert that owns it."""
    remix = random_remix_dit().eval()
    folded, weak, selected = FoldedRemix(remix), FoldedRemix(remix), []
    for switch in (folded, weak):
        select = switch.select
        monkeypatch.setattr(switch, "select", lambda i, select=select: selected.append(i) or select(i))
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 5, 7])
    denoise = GuidedDenoiser(folded, y, 10, make_schedule(3.0, [50, 1000], 1000), weak if guide else None, channels=4)
    for time in (900, 100, 500, 500, 999, 0):
        selected.clear()
        out = denoise(x, time)
        calls = 2 if guide and time else 1
        assert selected == [time // 50] * calls
        if guide or not time:
            expected = remix(x, torch.full((3,), time), y)
        else:
            both = torch.cat([x, x]), torch.full((6,), time), torch.cat([y, torch.full_like(y, 10)])
            expected = remix.forward_with_cfg(*both, 3.0, 4)[:3]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_guide_equal_to_the_model_changes_nothing():
    remix = random_remix_dit().eval()
    x, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 5, 7])
    guided = GuidedDenoiser(FoldedRemix(remix), y, 10, make_schedule(3.0, None, 1000), FoldedRemix(remix), channels=4)
    for time in (999, 500, 0):
        expected = remix(x, torch.full((3,), time), y)
        torch.testing.assert_close(guided(x, time), expected, rtol=1e-4, atol=1e-4)


def test_the_guide_gets_the_same_classes():
    def network(x, t, y):
        return (x + y.view(-1, 1, 1, 1)).repeat(1, 2, 1, 1)

    x, y = torch.zeros(2, 4, 1, 1), torch.tensor([3, 8])
    guide = lambda x, t, y: 2 * network(x, t, y)  # noqa: E731
    out = GuidedDenoiser(network, y, 10, make_schedule(3.0, None, 1000), guide)(x, 500)
    # Three of four channels are guided: 2 y + 3 (y - 2 y) = -y.
    assert out[:, :, 0, 0].tolist() == [[-3, -3, -3, 3, 3, 3, 3, 3], [-8, -8, -8, 8, 8, 8, 8, 8]]
    model = network(x, None, y)
    assert torch.equal(autoguidance(model, 2 * model, 1.0, 4), model)
    assert torch.equal(autoguidance(model, 2 * model, 0.0, 4)[:, :4], 2 * model[:, :4])


@pytest.mark.parametrize(("method", "tolerance"), [("heun", 5e-3), ("dopri5", 0.03)])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_gaussian_data_with_a_gaussian_guide_have_a_closed_form(method, tolerance, interval):
    """The velocity of normal data with variance s^2 is x d/dt log(V) / 2, with the variance V = t^2 s^2 + (1 - t)^2 at
    time t. Guidance with scale w by a guide of variance g^2 multiplies x, over an interval, by the ratio of V^(w / 2)
    and V_g^((w - 1) / 2) at its ends. The model has s = 0.5, and its guide is wider, with g = 0.8."""
    w, (low, high) = 2.5, interval

    def variance(std, t):
        return t**2 * std**2 + (1 - t) ** 2

    def velocity(std):
        def network(x, t, y):
            t = t.view(-1, 1, 1, 1)
            return x * (t * std**2 - (1 - t)) / variance(std, t)

        return network

    flow = create_flow()
    options = {"boundaries": interval} if method == "dopri5" else {}
    sampler = flow.make_sampler(method, 400, **options)
    schedule = make_schedule(w, list(interval), 1)
    labels = torch.zeros(5, dtype=torch.long)
    denoise = GuidedDenoiser(velocity(0.5), labels, 1, schedule, velocity(0.8), channels=4)
    noise = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    samples = sampler(denoise, noise)
    ratios = [variance(std, 1 - low) / variance(std, 1 - high) for std in (0.5, 0.8)]
    expected = noise * 0.5 * (ratios[0] / ratios[1]) ** ((w - 1) / 2)
    torch.testing.assert_close(samples, expected, rtol=tolerance, atol=0)
    assert ratios[0] / ratios[1] < 0.8, "the guidance changes the samples"


def test_guidance_at_all_levels_is_guidance_without_an_interval(ckpt, sampled, tmp_path):
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, f"--sample-dir={tmp_path}")
    run("sample_ddp.py", *flags, "--name=all", "--guidance-interval", 0, 1000)
    assert np.array_equal(sampled_images(tmp_path / "all"), sampled_images(sampled))


def test_a_guide_and_an_interval_are_recorded(ckpt, trained, tmp_path):
    flags = ("--ckpt", ckpt, *FEW_SAMPLES, "--num-fid-samples=2", f"--sample-dir={tmp_path}")
    guide = trained / "checkpoints/0000004.pt"
    # The folder of a run stands for its newest checkpoint.
    run("sample_ddp.py", *flags, "--guide-ckpt", trained, "--guidance-interval", 100, 600, "--cfg-scale=2")
    (folder,) = tmp_path.iterdir()
    assert folder.name == "run-0000004-ddpm8-cfg2.0-in100-600-by-trained-0000004-seed0"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["guidance_interval"] == [100, 600]
    assert settings["guide_ckpt"] == str(guide)
    assert settings["guide_fingerprint"] != settings["ckpt_fingerprint"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--guidance-interval", "600", "500"), "600 to 500 is not an interval"),
        (("--guidance-interval", "0", "500", "--cfg-scale=1"), "need a --cfg-scale other than 1"),
        (("--cfg-scale=2@0:300,3@200:400",), "overlaps another one"),
        (("--cfg-scale=2@300",), "expected SCALE@LOW:HIGH"),
        (("--guide-ckpt=/nowhere.pt",), "no such file"),
    ],
)
def test_wrong_input(ckpt, tmp_path, flags, message):
    check_sampling_refused(ckpt, tmp_path / "out", flags, message)


def test_a_guide_of_other_classes_is_refused(ckpt, tmp_path):
    torch.save(DiT_models["DiT-T/2"](input_size=8, in_channels=3, num_classes=7).state_dict(), tmp_path / "guide.pt")
    flags = ("--ckpt", ckpt, "--sample-dir", tmp_path / "out", "--guide-ckpt", tmp_path / "guide.pt")
    assert "has another number of classes" in run("sample_ddp.py", *flags, expect=2).stderr
