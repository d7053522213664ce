"""Files on the Hugging Face hub, which the tests cannot reach."""

import time

import pytest
import torch
from conftest import make_images, run

from checkpoint import load_model
from interop.own import fingerprint
from models import DiT_models
from runtime import hub
from runtime.errors import UserError

NAME = "hf:nyu-visionx/SiT-collections/SiT-S-2-256.pt"


@pytest.fixture(autouse=True)
def forget():
    """Forget what earlier tests found out."""
    hub.offline.cache_clear()
    hub.local_file.cache_clear()


def test_a_file_on_the_hub_is_loaded_like_a_local_one(monkeypatch, tmp_path):
    asked = []
    torch.save(DiT_models["DiT-T/4"](input_size=8).state_dict(), tmp_path / "a.pt")

    def download(repository: str, file: str, local_files_only: bool) -> str:
        asked.append((repository, file, local_files_only))
        return str(tmp_path / "a.pt")

    monkeypatch.setattr("runtime.hub.offline", lambda: False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    _, config = load_model("hf:owner/some-name/folder/a.pt")
    assert config["model"]["name"] == "DiT-T/4"
    assert fingerprint("hf:owner/some-name/folder/a.pt") == fingerprint(tmp_path / "a.pt")
    assert asked == [("owner/some-name", "folder/a.pt", False)], "the file is found once"


def test_no_network_is_found_out_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    start = time.monotonic()
    for script, *flags in (("sample_ddp.py", "--ckpt", NAME), ("convert.py", NAME, "a.pt", "--to=sit")):
        done = run(script, *flags, expect=2)
        assert f"{NAME}: not found on the Hugging Face hub: the hub cannot be reached" in done.stderr
        assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["hf:", "hf:owner/name", "hf:owner/name/", "hf://file"])
def test_incomplete_names(name):
    with pytest.raises(UserError, match="is named hf:OWNER/REPOSITORY/FILE"):
        hub.local_file(name)


def test_other_paths_are_left_alone(tmp_path):
    for path in ("pretrained/a.pt", tmp_path / "a.pt", "facebook/DiT-XL-2-256"):
        assert hub.local_file(path) is path


def test_a_vae_on_a_hub_that_cannot_be_reached(tmp_path):
    began = time.perf_counter()
    flags = ("--data-path", make_images(tmp_path / "images", per_class=1), "--features-path", tmp_path / "f")
    stderr = run("extract_features.py", *flags, expect=2).stderr
    assert "'stabilityai/sd-vae-ft-ema' (the Hugging Face hub cannot be reached): use --vae PATH" in stderr
    assert "or --vae none for models of pixels" in stderr
    assert time.perf_counter() - began < 25
    assert not (tmp_path / "f").exists()
