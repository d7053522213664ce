"""Files of the original Remix-DiT repository.

test_remix.py compares the outputs of such a file with the published ones.
"""

import pytest
import torch
from conftest import GOLDEN

from checkpoint import load_model, model_config
from interop import original
from models import DiT_models
from remix import RemixDiT, RemixDiT_models
from runtime.errors import UserError

ORIGINAL = GOLDEN / "remix_original_checkpoint.pt"


def test_numbers_of_bases_and_experts_are_found():
    model, _ = load_model(ORIGINAL, num_heads=4)
    assert isinstance(model, RemixDiT)
    assert (model.n_basis, model.n_experts) == (2, 4)


def test_an_unregistered_size_needs_its_number_of_heads():
    with pytest.raises(UserError, match="number of heads"):
        load_model(ORIGINAL)
    with pytest.raises(UserError, match="cannot be built"):
        load_model(ORIGINAL, num_heads=5)


def config(name, model) -> dict:
    """The config of a model that was trained with Gaussian diffusion."""
    return {"model": model_config(name, model), "diffusion": {"process": "gaussian"}, "data": {}}


@pytest.mark.parametrize("name", ["RemixDiT-T/4", "DiT-T/4"])
def test_written_files_are_read(tmp_path, name):
    registry = RemixDiT_models if name.startswith("Remix") else DiT_models
    models = {key: registry[name](input_size=8) for key in ("ema", "model")}
    original.write(tmp_path / "a.pt", models, config(name, models["ema"]))
    for key, model in models.items():
        back, back_config = load_model(tmp_path / "a.pt", ema=key == "ema")
        assert back_config["model"] == model_config(name, model)
        for parameter, value in model.state_dict().items():
            assert torch.equal(back.state_dict()[parameter], value)


@pytest.mark.parametrize("options", [{"mixer": "raw"}, {"scope": "local"}, {"layers": ["blocks.*.attn.qkv"]}])
def test_models_that_the_original_does_not_support(tmp_path, options):
    model = RemixDiT_models["RemixDiT-T/4"](input_size=8, **options)
    with pytest.raises(UserError, match="the original Remix-DiT supports softmax mixers of global scope"):
        original.write(
            tmp_path / "a.pt", {"ema": model}, {"model": model_config("RemixDiT-T/4", model), "diffusion": {}}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"n_basis": 4, "n_experts": 12},
        {"n_basis": 4, "n_experts": 10},
        {"n_basis": 2, "n_experts": 4, "boundaries": [0, 100, 200, 300, 1000]},
    ],
)
def test_numbers_of_experts_that_the_original_cannot_run(tmp_path, options):
    """It loads K=4, N=12 without an error, and uses wrong experts from timestep 249 on."""
    model = RemixDiT_models["RemixDiT-T/4"](input_size=8, **options)
    with pytest.raises(UserError, match=f"K={options['n_basis']}, N={options['n_experts']}"):
        original.write(
            tmp_path / "a.pt", {"ema": model}, {"model": model_config("RemixDiT-T/4", model), "diffusion": {}}
        )
    assert not list(tmp_path.iterdir())


def test_content_of_other_formats_is_not_read():
    state = DiT_models["DiT-T/4"](input_size=8).state_dict()
    for content in (state, {original.LOGITS: torch.zeros(4, 2)}, {**state, original.LOGITS: torch.zeros(4)}):
        assert original.read("a.pt", content, True, {}) is None
