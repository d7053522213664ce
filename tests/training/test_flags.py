"""The flags of train_fast.py, and --config, which starts a run with the flags of another."""

import json

import pytest
from conftest import assert_same_weights, run, training_flags

from runtime.command_line import flags as flags_of
from training.flags import NOT_RECORDED, make_parser


@pytest.fixture(scope="module")
def first(features, tmp_path_factory):
    """The folder of a run with flags of every kind."""
    folder = tmp_path_factory.mktemp("first")
    flags = ["--max-steps=2", "--sample-every=0", "--no-compile", "--freeze", "--mixer-scope=local", "--clip-grad=0.5"]
    start = [*training_flags(features, folder, "start", "DiT-T/2"), "--max-steps=1", "--sample-every=0"]
    run("train_fast.py", *start)
    weights = folder / "start/checkpoints/0000001.pt"
    boundaries = ["--boundaries", "0", "100", "200", "300", "400", "500", "1000"]
    run("train_fast.py", *training_flags(features, folder, "run"), *flags, *boundaries, f"--load-weight={weights}")
    return folder / "run"


def test_the_config_of_a_run_starts_the_same_run(first, tmp_path):
    run("train_fast.py", f"--config={first / 'config.json'}", f"--results-dir={tmp_path}", "--prefix=again")
    assert_same_weights(first / "checkpoints/0000002.pt", tmp_path / "again/checkpoints/0000002.pt")
    before, now = (json.loads((folder / "config.json").read_text()) for folder in (first, tmp_path / "again"))
    assert before.pop("flags") | {"results_dir": str(tmp_path)} == now.pop("flags")
    assert before == now


def test_flags_on_the_line_replace_those_of_the_config(first):
    parser = make_parser()
    args = parser.parse_args(
        [f"--config={first / 'config.json'}", "--lr=0.5", "--epochs=3", "--mixer=raw", "--compile"]
    )
    assert (args.lr, args.mixer, args.compile) == (0.5, "raw", True)
    # --max-steps replaces --epochs.
    assert (args.epochs, args.max_steps) == (3, None)
    assert (args.clip_grad, args.freeze, args.boundaries) == (0.5, True, [0, 100, 200, 300, 400, 500, 1000])


def test_every_flag_is_recorded_or_left_out_on_purpose():
    """All values, given as words, are those of the recorded flags."""
    parser = make_parser()
    given = {action.dest for action in parser._actions} - {"help", *NOT_RECORDED}
    words = ["--data-path=data", "--max-steps=3", "--timesteps", "0", "500", "--log-to=tensorboard", "--deterministic"]
    args = parser.parse_args(words)
    assert args.recorded.keys() <= given
    assert args.recorded.keys() == {name for name in given if getattr(args, name) is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not the config.json of a run"),
        ("[]", "is not the config.json of a run"),
        ('{"model": {}}', "is not the config.json of a run"),
        ('{"flags": 1}', "is not the config.json of a run"),
        ('{"flags": {"learning_rate": 1}}', "holds learning_rate, which is not a flag"),
        ('{"flags": {"lr": "fast"}}', "expected a finite number above 0"),
        ('{"flags": {"trust_pickle": true}}', "holds trust_pickle, which a run does not record"),
    ],
)
def test_a_wrong_config(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    stderr = run("train_fast.py", f"--config={path}", "--data-path=data", expect=2).stderr
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_flags_become_words():
    assert flags_of(lr=0.1, compile=False, boundaries=[0, 1]) == ["--lr=0.1", "--no-compile", "--boundaries", "0", "1"]


def test_the_config_of_an_independent_expert_starts_this_expert_alone(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "all", "DiT-T/2"), "--sample-every=0"]
    run("train_fast.py", *flags, "--independent=2", "--max-steps=4")
    run("train_fast.py", f"--config={tmp_path / 'all-1/config.json'}", "--prefix=alone")
    assert_same_weights(tmp_path / "all-1/checkpoints/0000002.pt", tmp_path / "alone/checkpoints/0000002.pt")


def test_recorded_flags_of_every_kind_are_read_again(tmp_path):
    parser = make_parser()
    words = [
        "--data-path=a b",
        "--log-to=tensorboard",
        "--boundaries",
        "0",
        "0.5",
        "1",
        "--process=flow",
        "--no-freeze",
    ]
    args = parser.parse_args([*words, "--lr=1e-5", "--deterministic", "--time-mean=-1.5", "--vae=-x", "--keep=3"])
    (tmp_path / "config.json").write_text(json.dumps({"flags": args.recorded}))
    again = parser.parse_args([f"--config={tmp_path / 'config.json'}"])
    assert again.recorded == args.recorded
    assert (again.freeze, again.deterministic, again.log_to) == (False, True, "tensorboard")
    # Switches of the config can be turned off.
    assert parser.parse_args([f"--config={tmp_path / 'config.json'}", "--no-deterministic"]).deterministic is False
