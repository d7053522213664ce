"""The README's commands are understood as they stand, up to the data that is not here."""

import re
import shlex

import pytest
from conftest import ROOT, run

SCRIPT = re.compile(r"(?:^|\| `)(?:torchrun|python) (?:[^`\n]* )?(\w+\.py)( [^`\n]*)?(?:`|$)", re.MULTILINE)
PUBLISHED = [  # the commands of the original repository's README
    "extract_features.py --model DiT-XL/2 --data-path data/imagenet/train --features-path data/imagenet_encoded",
    "train_fast.py --model RemixDiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt --data-path data/imagenet_encoded --epochs 20 "
    "--prefix RemixDiT-S-4-20-100K --ckpt-every 50000 --n-basis 4 --n-experts 20",
    "sample_ddp.py --model RemixDiT-S/2 --ckpt outputs/RemixDiT-S-4-20-100K/checkpoints/0100000.pt",
    "evaluator.py data/VIRTUAL_imagenet256_labeled.npz PATH_TO_YOUR.npz",
]
COMMANDS = [
    f"{script}{flags}" for script, flags in SCRIPT.findall((ROOT / "README.md").read_text()) if "..." not in flags
]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("command", [*PUBLISHED, *COMMANDS], ids=lambda command: command.split(".py")[0])
def test_commands_are_understood(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, *flags = shlex.split(command)
    said = run(script, *flags, expect=2).stderr
    assert "no such f" in said, "all that is missing is a file or a folder"
