"""Documentation: the scripts understand every command, and links to files resolve."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import MISSING, ROOT, run
from PIL import Image

pytestmark = pytest.mark.usefixtures("no_hub")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md"]
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *ROOT.glob("tests/*/*.md")])
# The commands of the original repository's README.
PUBLISHED = [
    "extract_features.py --model DiT-XL/2 --data-path data/imagenet/train --features-path data/imagenet_encoded",
    "train_fast.py --model RemixDiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt --data-path data/imagenet_encoded "
    "--epochs 20 --prefix RemixDiT-S-4-20-100K --ckpt-every 50000 --n-basis 4 --n-experts 20",
    "train_fast.py --model RemixDiT-S/2 --load-weight pretrained/DiT_S_2_2M.pt --data-path data/imagenet_encoded "
    "--epochs 20 --prefix RemixDiT-S-4-8-100K --ckpt-every 50000 --n-basis 4 --n-experts 20",
    "sample_ddp.py --model RemixDiT-S/2 --ckpt outputs/RemixDiT-S-4-20-100K/checkpoints/0100000.pt",
    "evaluator.py data/VIRTUAL_imagenet256_labeled.npz PATH_TO_YOUR.npz",
]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\w+=\S+ )*(?:torchrun|python|sbatch|recipes/run\.sh|scripts/\S+) [^`\n]+)`")
# What stands before the script: the environment, and the launcher with its options.
LAUNCHER = re.compile(
    r"(?:\w+=\S+ )*(?:python |torchrun (?:--\S+ )+|scripts/torchrun\.sh |sbatch (?:--\S+ )*scripts/(?=train\.sbatch))"
)
SHELL = re.compile(r"for \w+ in .*; do|done")


def commands_of(text: str) -> list[str]:
    """The commands in the code blocks and in the inline code of a page, without comments."""
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in lines if line and not SHELL.fullmatch(line)] + INLINE.findall(BLOCK.sub("", text))


COMMANDS = {str(page.relative_to(ROOT)): commands_of(page.read_text()) for page in DOCS}
COMMANDS["published"] = [f"python {command}" for command in PUBLISHED]


def arguments_of(command: str) -> list[str]:
    """The words of a command after the shell has expanded its variables and arithmetic."""
    printed = subprocess.run(
        ["bash", "-c", f"i=0 NODE0=localhost; printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    return printed.stdout.splitlines()


def test_the_pages_have_commands():
    commands = [command for page in COMMANDS.values() for command in page]
    scripts = sum(LAUNCHER.match(command) is not None for command in commands)
    assert scripts >= 20
    assert len(commands) - scripts >= 3


@pytest.mark.parametrize("page", [page for page, commands in COMMANDS.items() if commands])
def test_every_command_exists_with_its_flags(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS[page]:
        if launcher := LAUNCHER.match(command):
            script, *flags = arguments_of(command[launcher.end() :])
            check_script("train_fast.py" if script == "train.sbatch" else script, flags)
        else:
            check_other_command(command)


def check_script(script: str, flags: list[str]):
    if "--dry-run" in flags:
        run(script, *flags)
    else:
        stderr = run(script, *flags, expect=2).stderr
        assert MISSING.search(stderr), f"{script} {' '.join(flags)}: more than a file or a folder is missing: {stderr}"


def check_other_command(command: str):
    program, *arguments = shlex.split(command)
    if program == "make":
        (target,) = arguments
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif program == "hf":
        assert arguments[0] == "download"
    elif program == "mkdir":
        assert "tar -xzf -" in command
    elif program == "pip":
        assert arguments[:2] == ["install", "-r"]
        assert (ROOT / arguments[2]).is_file(), command
    else:
        assert program == "recipes/run.sh", f"{command}: no command that this test knows"
        size, name = arguments
        assert f"\n| {size} | {name} |" in (ROOT / "recipes" / "README.md").read_text(), command


def test_the_committed_script_draws_the_figure_of_the_method(tmp_path):
    run("scripts/draw_method.py", tmp_path / "method.png")
    with Image.open(tmp_path / "method.png") as drawn, Image.open(ROOT / "assets" / "method.png") as committed:
        assert drawn.size == committed.size


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_links_to_files_resolve():
    broken = []
    for page in MARKDOWN:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" not in link and not (target.exists() and (not anchor or anchor in anchors_of(target))):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def anchors_of(page: Path) -> list[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
