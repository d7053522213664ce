"""The checks that a checkpoint belongs to the run that resumes from it."""

from dataclasses import asdict

import pytest

from interop.own import save_checkpoint
from runtime.errors import UserError
from training.resume import read_resume
from training.settings import RunSettings


def test_features_that_do_not_record_the_hash_of_their_vae(tmp_path):
    """Those of earlier versions do not, nor the checkpoints of runs on them."""
    config = {"model": {}, "data": {"vae": "folder"}, "diffusion": {"process": "gaussian"}}
    config["training"] = asdict(RunSettings())
    new = config | {"data": {"vae": "folder", "vae_fingerprint": "a"}}
    state = {key: {} for key in ("model", "ema", "optimizer", "scaler", "window")} | {"step": 1}
    for trained in (config, new):
        save_checkpoint(tmp_path / "1.pt", state | {"config": trained})
        for now in (config, new):
            assert read_resume(tmp_path / "1.pt", now, "hold").step == 1
    other = config | {"data": {"vae": "folder", "vae_fingerprint": "b"}}
    with pytest.raises(UserError, match="vae_fingerprint=a, this run asks for b"):
        read_resume(tmp_path / "1.pt", other, "hold")
