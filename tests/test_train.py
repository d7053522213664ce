"""train_fast.py: runs, resumed runs, several processes, data that are not finite, and wrong input."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_same_weights, losses, run, training_flags

from checkpoint import load_model
from diffusion import create_flow, create_process
from features.autoencoder import Normalization
from features.dataset import write_index, write_shard
from interop.own import checkpoints, find_corruption, read_checkpoint, save_checkpoint
from models import DiT_models
from runtime.command_line import flags as flags_of
from runtime.errors import UserError
from sampling.loading import load_denoiser
from training.flags import make_parser
from training.initial import InitialWeights, make_model
from training.resolve import process_options, resolve_settings


def test_the_files_of_a_run(trained, features):
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoints", "config.json", "log.txt", "metrics.jsonl"]
    state = torch.load(trained / "checkpoints" / "0000004.pt", weights_only=True)
    config = json.loads((trained / "config.json").read_text())
    assert config.pop("flags")["lr"] == 1e-3
    assert state["config"] == config
    assert state["config"]["data"]["classes"] == ["class0", "class1", "class2"]
    assert set(losses(trained)) == {1, 2, 3, 4}
    model, _ = load_model(trained / "checkpoints" / "0000004.pt")
    assert (model.n_basis, model.n_experts, model.num_classes) == (2, 6, 3)
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    weights = [line["prior_weight"] / 1e-4 for line in metrics]
    assert weights == pytest.approx([1, 0.75, 0.5, 0.25]), "the prior's weight falls linearly to zero"
    assert metrics[0]["lr"] == pytest.approx(1e-3)
    assert metrics[2]["lr"] == pytest.approx(0.75e-3), "halfway down the cosine from the peak to its half"
    assert "images/s" in (trained / "log.txt").read_text()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(trained, features, tmp_path, accumulate):
    """With two microbatches per process, the six groups of two images are divided over four microbatches of three, and
    the activations are recomputed."""
    flags = training_flags(features, tmp_path, "two")
    recompute = ["--checkpoint-activations"] if accumulate > 1 else []
    run("train_fast.py", *flags, "--max-steps", 4, "--grad-accum", accumulate, *recompute, processes=2)
    one, two = losses(trained), losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    assert_same_weights(trained / "checkpoints/0000004.pt", tmp_path / "two/checkpoints/0000004.pt", exact=False)


@pytest.mark.parametrize("model", ["RemixDiT-T/2", "DiT-T/2"])
def test_a_resumed_run_is_the_uninterrupted_one(features, tmp_path, model):
    schedule = ("--max-steps=6", "--ckpt-every=4", "--log-every=3")
    run("train_fast.py", *training_flags(features, tmp_path, "whole", model), *schedule)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed/checkpoints/0000006.pt").unlink()
    resumed = training_flags(features, tmp_path, "resumed", model)
    done = run("train_fast.py", *resumed, *schedule, "--resume=auto")
    assert "0000004.pt" in done.stderr
    # The checkpoint lies between two reports, whose means must not change.
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed"), "bit for bit"
    assert_same_weights(tmp_path / "whole/checkpoints/0000006.pt", tmp_path / "resumed/checkpoints/0000006.pt")


@pytest.mark.parametrize(
    ("processes", "flag"),
    [(2, "--shard-bases"), pytest.param(4, "--no-shard-bases", marks=pytest.mark.slow)],
)
def test_resuming_with_another_number_of_processes(features, tmp_path, processes, flag):
    """The checkpoint lies between two reports: the sums that it stores must not count several times."""
    schedule = ("--max-steps=6", "--ckpt-every=4", "--log-every=6")
    run("train_fast.py", *training_flags(features, tmp_path, "one"), *schedule)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two/checkpoints/0000006.pt").unlink()
    flags = [*training_flags(features, tmp_path, "two"), *schedule, "--resume=auto", flag, "--sample-every=6"]
    run("train_fast.py", *flags, processes=processes)
    assert losses(tmp_path / "two")[6] == pytest.approx(losses(tmp_path / "one")[6], rel=1e-4)
    assert_same_weights(tmp_path / "one/checkpoints/0000006.pt", tmp_path / "two/checkpoints/0000006.pt", exact=False)
    metrics = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "two")]
    assert metrics[1]["expert_spread"] == pytest.approx(metrics[0]["expert_spread"], rel=1e-3)
    assert (tmp_path / "two/samples/0000006.png").exists()


@pytest.mark.parametrize(
    ("model", "options", "flags"),
    [
        ("RemixDiT-T/2", dict(time_sampling="logit-normal", time_std=0.5, shift=2.0), ("--mixer=raw",)),
        ("RemixDiT-T/2", dict(path="GVP"), ("--n-experts=2", "--boundaries", 0, 0.875, 1)),
        ("DiT-T/2", dict(path="VP", prediction="noise", weight="velocity"), ("--timesteps", 0.25, 1)),
    ],
)
def test_a_flow_trains_and_resumes(features, tmp_path, model, options, flags):
    flags = (*flags_of(**{"time_shift" if name == "shift" else name: value for name, value in options.items()}), *flags)
    schedule = ("--process=flow", *flags, "--max-steps=6", "--ckpt-every=4", "--log-every=3", "--sample-every=6")
    run("train_fast.py", *training_flags(features, tmp_path, "whole", model), *schedule)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed/checkpoints/0000006.pt").unlink()
    run("train_fast.py", *training_flags(features, tmp_path, "resumed", model), *schedule, "--resume=auto")
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed"), "bit for bit"
    assert_same_weights(tmp_path / "whole/checkpoints/0000006.pt", tmp_path / "resumed/checkpoints/0000006.pt")
    # A model of some noise levels cannot generate samples.
    assert (tmp_path / "whole/samples/0000006.png").exists() == ("--timesteps" not in flags)
    metrics = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["loss"] > 0
    assert not {"mse", "vb"} & metrics.keys(), "a flow's loss has no parts"
    _, config = load_model(tmp_path / "whole/checkpoints/0000006.pt")
    assert create_process(**config["diffusion"]).config == create_flow(**options).config
    again = [*training_flags(features, tmp_path, "whole", model), "--max-steps=6", "--resume=auto"]
    assert "trained with --process flow" in run("train_fast.py", *again, expect=2).stderr


def test_a_flow_learns_and_its_experts_own_the_quantiles(features, tmp_path):
    flags = [*training_flags(features, tmp_path, "flow"), "--process=flow", "--time-shift=0.5"]
    run("train_fast.py", *flags, "--max-steps", 100, "--log-every", 50)
    first, last = losses(tmp_path / "flow").values()
    assert last < 0.85 * first
    model, _ = load_model(tmp_path / "flow/checkpoints/0000100.pt")
    assert model.boundaries == pytest.approx(create_flow(shift=0.5).quantiles(6))


def test_the_learning_rate_of_the_logits_ends_at_half_of_that_of_the_weights(features, tmp_path):
    """The published training lowers both rates to the same value. --coeff-lr-end chooses another one."""
    for name, flags, end in (("default", (), 5e-4), ("high", ("--coeff-lr-end=4e-3",), 4e-3)):
        run("train_fast.py", *training_flags(features, tmp_path, name), "--max-steps=2", *flags)
        _, middle = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        assert middle["coeff_lr"] == pytest.approx((1e-2 + end) / 2)
        assert middle["lr"] == pytest.approx(0.75e-3)


def test_the_loss_weight_is_a_setting_of_the_run(trained, features, tmp_path):
    flags = [*training_flags(features, tmp_path, "weighted"), "--max-steps=4"]
    run("train_fast.py", *flags, "--min-snr=5", "--min-weight=0.2")
    config = json.loads((tmp_path / "weighted/config.json").read_text())
    assert (config["training"]["min_snr"], config["training"]["min_weight"]) == (5, 0.2)
    first, weighted = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        for folder in (trained, tmp_path / "weighted")
    )
    # The first step has the same images, timesteps and noise.
    assert weighted["mse"] == pytest.approx(first["mse"], rel=1e-5)
    unweighted = first["loss"] - first["mse"]
    assert 0.2 * first["mse"] < weighted["loss"] - unweighted < 0.95 * first["mse"]
    refused = run("train_fast.py", *flags, "--resume=auto", expect=2).stderr
    assert "training.min_snr=5.0, this run asks for None" in refused
    assert run("train_fast.py", *flags, "--resume=auto", "--min-snr=5", "--min-weight=0.2")


def test_a_recipe_gives_the_settings_that_the_flags_leave_open():
    def settings(*flags):
        args = make_parser().parse_args(["--data-path=-", *flags])
        return resolve_settings(args, 1000, create_process())

    names = ("experts_per_batch", "lr", "coeff_lr", "coeff_lr_end", "prior_strength", "prior_bonus")
    published = dict(zip(names, (8, 2e-5, 1e-2, 1e-5, 1e-4, 3), strict=True))
    paper = settings("--recipe=paper", "--load-weight=-")
    assert {name: getattr(paper, name) for name in names} == published
    # Zeros and the defaults' own values count as given, before and after the recipe.
    changed = settings("--prior-strength=0", "--experts-per-batch=16", "--recipe=paper", "--prior-bonus=0", "--lr=1e-3")
    given = dict(prior_strength=0, experts_per_batch=16, prior_bonus=0, lr=1e-3)
    assert {name: getattr(changed, name) for name in names} == published | given
    plain = settings("--recipe=paper", "--model=DiT-S/2")
    assert (plain.lr, plain.experts_per_batch, plain.coeff_lr_end) == (1e-4, 1, None)
    with pytest.raises(UserError, match="--experts-per-batch 8 does not divide"):
        settings("--recipe=paper", "--global-batch-size=12")


def test_the_recipes_of_flows_and_the_optimizers_flags_are_recorded_and_resumed(features, tmp_path):
    """The recipe's flow, loss and optimizer, in a dry run, a run, a resumed run and a run with changed settings."""
    flags = [*training_flags(features, tmp_path, "run"), "--recipe=lightningdit", "--max-steps=4", "--ckpt-every=2"]
    flags += ["--warmup=2", "--lr-schedule=constant", "--weight-decay=0.1", "--clip-grad=1", "--sample-every=0"]
    optimizer = "optimizer: lr_schedule=constant, warmup=2, beta2=0.95, weight_decay=0.1, clip_grad=1.0"
    assert optimizer in run("train_fast.py", *flags, "--dry-run").stdout
    run("train_fast.py", *flags)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["diffusion"]["time_sampling"] == "logit-normal"
    expected = dict(lr_schedule="constant", warmup=2, beta2=0.95, weight_decay=0.1, cosine_weight=1.0)
    assert expected.items() <= config["training"].items()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert all(line["cosine_weight"] == 1 and 0 < line["cosine"] < 2 for line in lines)
    assert optimizer in (tmp_path / "run/log.txt").read_text()
    (tmp_path / "run/checkpoints/0000004.pt").rename(tmp_path / "whole.pt")
    refused = run("train_fast.py", *flags, "--resume=auto", "--beta2=0.9", expect=2).stderr
    assert "training.beta2=0.95, this run asks for 0.9" in refused
    run("train_fast.py", *flags, "--resume=auto")
    assert_same_weights(tmp_path / "whole.pt", tmp_path / "run/checkpoints/0000004.pt")


def test_flags_of_a_flows_recipe_can_be_overridden(features):
    shape = (768, 16, 16)

    def settings(*flags):
        args = make_parser().parse_args(["--data-path=-", *flags])
        process = process_options(args, shape)
        return process, resolve_settings(args, 1000, create_process(**process))

    process, training = settings("--recipe=rae")
    assert (process["process"], process["time_sampling"], process["time_max"]) == ("flow", "uniform", 0.999)
    assert process["shift"] == pytest.approx(6.9282, abs=1e-4)
    assert (training.beta2, training.cosine_weight) == (0.999, 0)
    process, training = settings("--recipe=rae", "--time-shift=2", "--time-max=1", "--beta2=0.9", "--cosine-weight=3")
    assert (process["shift"], process.get("time_max")) == (2, None)
    assert (training.beta2, training.cosine_weight) == (0.9, 3)
    flags = ("--time-sampling=uniform", "--beta2=0.999", "--cosine-weight=0")
    process, training = settings("--recipe=lightningdit", *flags)
    assert (process["time_sampling"], training.beta2, training.cosine_weight) == ("uniform", 0.999, 0)
    process, training = settings("--recipe=lightningdit", "--time-mean=1")
    assert (process["time_mean"], training.beta2, training.cosine_weight) == (1, 0.95, 1)
    with pytest.raises(UserError, match="--recipe rae needs --process flow"):
        settings("--recipe=rae", "--process=gaussian")
    with pytest.raises(UserError, match="--cosine-weight needs --prediction velocity, not score"):
        settings("--recipe=lightningdit", "--prediction=score")


def test_a_checkpoint_without_later_settings_resumes(trained, features, tmp_path):
    """Earlier versions did not record the optimizer's schedule."""
    shutil.copytree(trained, tmp_path / "trained")
    path = tmp_path / "trained/checkpoints/0000004.pt"
    state = read_checkpoint(path)
    for name in ("lr_schedule", "warmup", "beta2", "weight_decay", "cosine_weight"):
        del state["config"]["training"][name]
    save_checkpoint(path, state)
    flags = [*training_flags(features, tmp_path, "trained"), "--max-steps=5", "--resume=auto"]
    run("train_fast.py", *flags)
    assert read_checkpoint(tmp_path / "trained/checkpoints/0000005.pt")["config"]["training"]["beta2"] == 0.999


def test_a_run_continues_with_another_rate_precision_and_ema_from_its_weights(trained, features, tmp_path):
    """As docs/recovery.md explains it: with the flags of the run, from its EMA weights, as a new run."""
    flags = [f"--config={trained / 'config.json'}", f"--load-weight={trained}", f"--results-dir={tmp_path}"]
    flags += ["--lr=5e-4", "--precision=bf16", "--ema-decay=0.5", "--warmup=1", "--prefix=changed", "--max-steps=1"]
    run("train_fast.py", *flags)
    before = read_checkpoint(trained / "checkpoints/0000004.pt")
    state = read_checkpoint(tmp_path / "changed/checkpoints/0000001.pt")
    now, old = state["config"]["training"], before["config"]["training"]
    assert (now["lr"], now["precision"], now["ema_decay"], now["warmup"]) == (5e-4, "bf16", 0.5, 1)
    assert now["global_batch_size"] == old["global_batch_size"]
    key = "backbone.blocks.0.attn.qkv.weight"
    # One step of Adam changes a weight by at most the rate, and the EMA by half of it.
    assert 0 < (state["ema"][key] - before["ema"][key]).abs().max() <= 2.5e-4 * 1.01
    assert all(moments["step"] == 1 for moments in state["optimizer"]["state"].values())


def test_initial_weights_of_latents_of_another_normalization_are_warned_about(trained, capsys):
    shape = dict(input_size=8, in_channels=3, num_classes=3)
    mixing = json.loads((trained / "config.json").read_text())["model"]["remix"]
    for normalization, warns in ((Normalization(), False), (Normalization(0.5), True)):
        start = InitialWeights(str(trained), normalization=normalization)
        make_model("RemixDiT-T/2", shape, mixing, 3.0, start)
        assert ("of another normalization than those of the features" in capsys.readouterr().err) == warns


def test_a_run_resumes_with_its_learning_rates_and_its_prior(features, tmp_path):
    """The prior's bonus has no effect after step 0: it need not be given again."""
    flags = [*training_flags(features, tmp_path, "run"), "--max-steps=2", "--ckpt-every=1"]
    run("train_fast.py", *flags, "--coeff-lr-end=5e-3", "--prior-bonus=3")
    (tmp_path / "run/checkpoints/0000002.pt").rename(tmp_path / "whole.pt")
    refused = run("train_fast.py", *flags, "--resume=auto", expect=2).stderr
    assert "coeff_lr_end=0.005, this run asks for 0.0005" in refused
    run("train_fast.py", *flags, "--resume=auto", "--coeff-lr-end=5e-3")
    assert_same_weights(tmp_path / "whole.pt", tmp_path / "run/checkpoints/0000002.pt")
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["prior_bonus"] == 3


def test_a_finished_run_is_extended(features, tmp_path):
    """With the final learning rate, or with the schedule of a longer run. An extension can be interrupted as well."""

    def extend(name, *flags, expect=0):
        common = [*training_flags(features, tmp_path, name), "--ckpt-every=2", "--resume=auto"]
        return run("train_fast.py", *common, *flags, expect=expect)

    def rates(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["lr"] / 1e-3 for line in lines]

    extend("hold", "--max-steps=4")
    shutil.copytree(tmp_path / "hold", tmp_path / "stretch")
    short = rates("hold")
    extend("hold", "--max-steps=8")
    assert rates("hold") == pytest.approx([*short, 0.5, 0.5, 0.5, 0.5])
    extend("stretch", "--max-steps=8", "--extend=stretch")
    cosine = [0.75 + 0.25 * math.cos(math.pi * step / 8) for step in range(8)]
    assert rates("stretch") == pytest.approx([*short, *cosine[4:]])

    shutil.copytree(tmp_path / "hold", tmp_path / "interrupted")
    (tmp_path / "interrupted/checkpoints/0000008.pt").unlink()
    for steps in (7, 9):
        assert "only a finished run" in extend("interrupted", f"--max-steps={steps}", expect=2).stderr
    extend("interrupted", "--max-steps=8")
    assert_same_weights(*(tmp_path / name / "checkpoints/0000008.pt" for name in ("hold", "interrupted")))
    extend("interrupted", "--max-steps=9")
    assert rates("interrupted")[-1] == pytest.approx(0.5)


def test_starting_from_a_pretrained_dit(features, tmp_path):
    torch.manual_seed(0)
    dit = DiT_models["DiT-T/2"](input_size=8, in_channels=3, num_classes=3)
    torch.save({"ema": dit.state_dict()}, tmp_path / "dit.pt")
    for model in ("DiT-T/2", "RemixDiT-T/2"):
        prefix = model.replace("/", "-")
        flags = [*training_flags(features, tmp_path, prefix, model), f"--load-weight={tmp_path / 'dit.pt'}"]
        run("train_fast.py", *flags, "--max-steps=1", "--lr=1e-9", "--coeff-lr=0", "--strict")
        trained, _ = load_model(tmp_path / prefix / "checkpoints/0000001.pt")
        expert = trained if model == "DiT-T/2" else trained.expert(5)
        for key, value in dit.state_dict().items():
            torch.testing.assert_close(expert.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_later_checkpoints_of_another_schedule_are_not_continued(features, tmp_path):
    """--resume auto would continue them, after an interruption of the run that is to replace them."""
    flags = [*training_flags(features, tmp_path, "run", "DiT-T/2"), "--sample-every=0"]
    folder = tmp_path / "run/checkpoints"
    run("train_fast.py", *flags, "--max-steps=2")
    run("train_fast.py", *flags, "--max-steps=3", "--resume=auto")
    first = [*flags, f"--resume={folder / '0000002.pt'}"]
    assert (
        "schedule of 2 steps: remove it"
        in run("train_fast.py", *first, "--max-steps=4", "--extend=stretch", expect=2).stderr
    )
    run("train_fast.py", *first, "--max-steps=4")
    (folder / "0000003.pt").unlink()
    (folder / "0000004.pt").write_bytes((folder / "0000004.pt").read_bytes()[:1000])
    run("train_fast.py", *first, "--max-steps=3", "--extend=stretch")


def test_a_resumed_run_names_the_weights_that_it_started_from(features, tmp_path):
    """In its log, in its config.json and in its checkpoints, whatever --load-weight the command has."""
    for seed, name in enumerate(("first.pt", "other.pt")):
        torch.manual_seed(seed)
        dit = DiT_models["DiT-T/2"](input_size=8, in_channels=3, num_classes=3)
        torch.save({"ema": dit.state_dict()}, tmp_path / name)
    flags = [*training_flags(features, tmp_path, "run"), "--lr=1e-4", "--sample-every=0"]
    load = [f"--load-weight={tmp_path / name}" for name in ("first.pt", "other.pt")]
    scratch = [*training_flags(features, tmp_path, "scratch"), "--lr=1e-4", "--sample-every=0"]
    for command, resumes, started in (
        ([*flags, load[0]], ([load[1]], [], [load[0]]), str(tmp_path / "first.pt")),
        (scratch, ([load[1]],), None),
    ):
        run("train_fast.py", *command, "--max-steps=1")
        for steps, changes in enumerate(resumes, 2):
            rest = [flag for flag in command if flag not in load]
            run("train_fast.py", *rest, *changes, f"--max-steps={steps}", "--resume=auto")
            folder = tmp_path / ("run" if started else "scratch")
            first = [line for line in (folder / "log.txt").read_text().splitlines() if "M parameters" in line]
            assert [line.partition(", from ")[2] for line in first] == [started or "scratch"] * steps
            _, config = load_model(folder / f"checkpoints/{steps:07d}.pt")
            assert config["training"]["load_weight"] == started
            assert json.loads((folder / "config.json").read_text())["training"]["load_weight"] == started


def test_new_classes_keep_the_embeddings_of_equal_names(trained):
    path = str(trained / "checkpoints/0000004.pt")
    shape = dict(input_size=8, in_channels=3, num_classes=4)
    mixing = load_model(path)[0].mixing_config
    new = ["cat", "class2", "dog", "class0"]
    with pytest.raises(UserError, match="has 3 classes, this run has 4: --new-classes"):
        make_model("RemixDiT-T/2", shape, mixing, 3.0, InitialWeights(path, classes=new))
    with pytest.raises(UserError, match="its class 0 is class0, in the features it is class1: --new-classes"):
        start = InitialWeights(path, classes=["class1", "class0", "class2"])
        make_model("RemixDiT-T/2", shape | {"num_classes": 3}, mixing, 3.0, start)
    model = make_model("RemixDiT-T/2", shape, mixing, 3.0, InitialWeights(path, classes=new, new_classes=True))
    before = load_model(path)[0].backbone.y_embedder.embedding_table.weight
    after = model.backbone.y_embedder.embedding_table.weight
    assert torch.equal(after[[1, 3, 4]], before[[2, 0, 3]])
    assert model.config["num_classes"] == model.num_classes == 4


@pytest.mark.parametrize("boundaries", [None, [0, 100, 400, 1000]])
def test_independent_experts_in_one_command(features, tmp_path, boundaries):
    """Each is the run with its --timesteps alone. The second command continues what the first has not done."""
    flags = training_flags(features, tmp_path, "expert", "DiT-T/2")
    command = [*flags, "--independent=3", "--max-steps=7", "--sample-every=0"]
    if boundaries:
        command += ["--boundaries", *boundaries]
    run("train_fast.py", *command)
    log = (tmp_path / "expert-2/log.txt").read_text()
    assert "--independent 3 does not divide 7 steps: each expert trains for 2 steps, together 6" in log
    files = [tmp_path / f"expert-{i}/checkpoints/0000002.pt" for i in range(3)]
    _, first, last, _ = boundaries or [0, 333, 666, 1000]
    alone = training_flags(features, tmp_path, "alone", "DiT-T/2")
    run("train_fast.py", *alone, "--timesteps", first, last, "--max-steps=2", "--sample-every=0")
    assert_same_weights(files[1], tmp_path / "alone/checkpoints/0000002.pt")
    _, config = load_denoiser(files)
    assert config["training"]["timesteps"] == [0, first]

    files[1].rename(tmp_path / "whole.pt")
    assert "expert-0 already holds a run" in run("train_fast.py", *command, expect=2).stderr
    others = "--boundaries", 0, first, 900, 1000
    stderr = run("train_fast.py", *command, *others, "--resume=auto", "--max-steps=21", expect=2).stderr
    assert f"expert-2 was trained with the timesteps [{last}, 1000]" in stderr
    stderr = run("train_fast.py", *flags, "--independent=3", "--process=flow", "--resume=auto", expect=2).stderr
    assert "was trained with --process gaussian" in stderr
    assert not files[0].with_name("0000007.pt").exists(), "expert 0 has the same interval, but was not trained further"
    run("train_fast.py", *command, "--resume=auto")
    assert_same_weights(files[1], tmp_path / "whole.pt")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_the_same(trained, features, tmp_path, precision):
    flags = [*training_flags(features, tmp_path, precision), f"--precision={precision}"]
    run("train_fast.py", *flags, "--max-steps=4", "--clip-grad=10", "--mixer-scope=local")
    assert list(losses(tmp_path / precision).values()) == pytest.approx(list(losses(trained).values()), rel=0.05)


@pytest.mark.parametrize(("mixer", "scope"), [("softmax", "local"), ("raw", "global"), ("one-hot", "local")])
def test_every_mixer_and_scope_trains_and_resumes(features, tmp_path, mixer, scope):
    flags = [*training_flags(features, tmp_path, "run"), "--mixer", mixer, "--mixer-scope", scope, "--mix-modulation"]
    run("train_fast.py", *flags, "--max-steps", 2, "--ckpt-every", 1)
    model, _ = load_model(tmp_path / "run/checkpoints/0000002.pt")
    assert (model.mixer, model.scope, len(model.mixing_config["layers"])) == (mixer, scope, 5)
    (tmp_path / "run/checkpoints/0000002.pt").rename(tmp_path / "whole.pt")
    run("train_fast.py", *flags, "--max-steps", 2, "--resume", "auto")
    assert_same_weights(tmp_path / "whole.pt", tmp_path / "run/checkpoints/0000002.pt")


def test_raw_coefficients_have_no_entropy(features, tmp_path):
    """They may be negative and need not sum to 1, so they are no distribution."""
    run("train_fast.py", *training_flags(features, tmp_path, "raw"), "--mixer=raw", "--max-steps=1", "--sample-every=0")
    (line,) = map(json.loads, (tmp_path / "raw/metrics.jsonl").read_text().splitlines())
    assert "entropy" not in line and line["expert_spread"] > 0
    log = (tmp_path / "raw/log.txt").read_text()
    assert "entropy" not in log and "spread" in log


def test_the_metrics_show_whether_bases_or_experts_collapse(trained):
    for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()):
        assert len(line["entropy"]) == 6
        assert all(0 < entropy < 0.694 for entropy in line["entropy"])
        assert [len(row) for row in line["coefficients"]] == [2] * 6
        assert line["basis_distances"][0][1] == line["basis_distances"][1][0] > 0.1, "the bases start different"
        assert line["expert_spread"] > 0


def test_deterministic_algorithms_and_recomputed_activations_change_no_loss(trained, features, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = ("--max-steps=4", "--deterministic", "--checkpoint-activations")
    try:
        run("train_fast.py", *training_flags(features, tmp_path, "other"), *flags)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "other") == losses(trained), "bit for bit"
    assert_same_weights(trained / "checkpoints/0000004.pt", tmp_path / "other/checkpoints/0000004.pt")


@pytest.mark.slow
def test_compiled_training_is_the_same(trained, features, tmp_path):
    run("train_fast.py", *training_flags(features, tmp_path, "compiled"), "--max-steps", 4, "--compile")
    assert list(losses(tmp_path / "compiled").values()) == pytest.approx(list(losses(trained).values()), rel=1e-4)


def test_training_learns(features, tmp_path):
    run("train_fast.py", *training_flags(features, tmp_path, "long"), "--max-steps", 150, "--log-every", 50)
    first, *_, last = losses(tmp_path / "long").values()
    assert last < 0.75 * first


def wrong(name, message, *flags, processes=1, model="RemixDiT-T/2"):
    return pytest.param(flags, message, processes, model, id=name)


@pytest.mark.parametrize(
    ("flags", "message", "processes", "model"),
    [
        wrong("missing data", "no such folder", "--data-path", "/nowhere"),
        wrong("no features", "holds no features", "--data-path", str(GOLDEN)),
        wrong("image size", "holds features of 8-pixel images", "--image-size", "16"),
        wrong("classes", "labels from 0 to 2", "--num-classes", "2"),
        wrong("N", "at least 1 and at most 1000", "--n-experts", "1001"),
        wrong("groups", "does not divide", "--experts-per-batch", "5"),
        wrong("prefix", "plain folder name", "--prefix", "../escape"),
        wrong("learning rate", "above 0", "--lr", "nan"),
        wrong("timesteps", "must increase", "--timesteps", "500", "500", model="DiT-T/2"),
        wrong("timesteps of a RemixDiT", "trains on all timesteps", "--timesteps", "0", "500"),
        wrong("range of boundaries", "run from 0 to 1000", "--boundaries", "0", "0.5", "1"),
        wrong("number of boundaries", "6 experts need 7 boundaries", "--boundaries", "0", "500", "1000"),
        wrong("boundaries without timesteps", "no timestep", "--boundaries", "0", "0.1", "0.2", "1000"),
        wrong("boundaries of a DiT", "needs a RemixDiT", "--boundaries", "0", "1000", model="DiT-T/2"),
        wrong("boundaries of a flow", "run from 0 to 1", "--process=flow", "--boundaries", "0", "875", "1000"),
        wrong("experts without times", "6 experts of equal probability", "--process=flow", "--time-shift=1e6"),
        wrong("path", "need --process flow", "--path=VP"),
        wrong("cosine of Gaussian diffusion", "need --process flow", "--cosine-weight=1"),
        wrong("beta2", "it must be below 1", "--beta2=1"),
        wrong("end of a constant rate", "no meaning", "--lr-schedule=constant", "--coeff-lr-end=1e-3"),
        wrong("loss weight of a flow", "need --process gaussian", "--process=flow", "--min-snr=5"),
        wrong("bound of no loss weight", "needs --min-snr", "--min-weight=0.2"),
        wrong("bound of 1", "makes every weight 1", "--min-snr=5", "--min-weight=1"),
        wrong("mean of uniform times", "need --time-sampling logit-normal", "--process=flow", "--time-mean=1"),
        wrong("weight", "velocity prediction takes none", "--process=flow", "--weight=likelihood"),
        wrong("independent Remix-DiTs", "trains a plain DiT per interval", "--independent", "2"),
        wrong("too few steps", "fewer steps than experts", "--independent", "3", model="DiT-T/2"),
        wrong(
            "boundaries of fewer experts",
            "--independent 3 needs 4 --boundaries, not 3",
            *("--independent=3", "--boundaries", "0", "500", "1000"),
            model="DiT-T/2",
        ),
        wrong("missing weights", "no such file", "--load-weight", "/nowhere.pt"),
        wrong("foreign weights", "number of heads", "--load-weight", str(GOLDEN / "remix_original_checkpoint.pt")),
        wrong("results", "Not a directory", "--results-dir", str(GOLDEN / "dit.pt")),
        wrong("classes of nothing", "--new-classes needs --load-weight", "--new-classes"),
        wrong("no weights", "holds no", "--load-weight", str(GOLDEN / "diffusion.pt")),
        wrong("resume nothing", "no such file", "--resume", "/nowhere.pt"),
        wrong("resume a folder", "is a folder without checkpoints", "--resume", str(GOLDEN)),
        wrong("resume weights", "no training state", "--resume", str(GOLDEN / "dit.pt")),
        wrong("world", "cannot be divided equally among 2 processes", "--global-batch-size", "11", processes=2),
    ],
)
def test_wrong_input(features, tmp_path, flags, message, processes, model):
    all_flags = [*training_flags(features, tmp_path / "out", "wrong", model), "--max-steps", 2, *flags]
    done = run("train_fast.py", *all_flags, processes=processes, expect=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("train_fast.py: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert done.stderr.strip() == errors[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_to_resume_from_stands_for_its_newest_checkpoint(trained, features, tmp_path):
    shutil.copytree(trained, tmp_path / "trained")
    flags = [*training_flags(features, tmp_path, "trained"), "--max-steps=4", "--resume"]
    for folder in (tmp_path / "trained", tmp_path / "trained/checkpoints"):
        stderr = run("train_fast.py", *flags, folder).stderr
        assert f"resumed from {tmp_path / 'trained/checkpoints/0000004.pt'}" in stderr


def test_nothing_is_overwritten_or_mixed(trained, features, tmp_path):
    shutil.copytree(trained, tmp_path / "trained")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trained").rglob("*")}
    again = [*training_flags(features, tmp_path, "trained"), "--max-steps", 4]
    assert "already holds a run" in run("train_fast.py", *again, expect=2).stderr
    for change, message in (
        (("--max-steps", 3), "belongs to a run of 4 steps, this run asks for 3"),
        (("--global-seed", 1), "global_seed=0, this run asks for 1"),
        (("--n-basis", 3), "n_basis=2, this run asks for 3"),
        (("--model", "DiT-T/2"), "was trained with"),
    ):
        assert message in run("train_fast.py", *again, "--resume", "auto", *change, expect=2).stderr
    cut = tmp_path / "trained/checkpoints/0000009.pt"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trained").rglob("*")} == before
    cut.write_bytes((trained / "checkpoints/0000004.pt").read_bytes()[:5000])
    assert "not a complete checkpoint" in run("train_fast.py", *again, "--resume", cut, expect=2).stderr


def test_help():
    out = run("train_fast.py", "--help").stdout
    for flag in ("--experts-per-batch", "--prior-strength", "--resume", "--precision"):
        assert flag in out


@pytest.fixture(scope="module")
def with_nan(tmp_path_factory):
    """48 images, one of them all NaN, which makes one of four batches of 12 non-finite."""
    path = tmp_path_factory.mktemp("nan")
    rows = np.random.default_rng(0).normal(size=(48, 1, 3, 8, 8))
    rows[5] = np.nan
    write_shard(path, 0, rows, np.arange(48) % 3, {})
    write_index(path, 1, vae="none", scale=1.0, image_size=8, classes=["a", "b", "c"])
    return path


def test_a_nan_on_one_process_of_two_is_skipped_on_both(with_nan, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        flags = [*training_flags(with_nan, tmp_path, name), "--max-steps=8", "--shard-bases"]
        run("train_fast.py", *flags, processes=processes)
    one, two = (load_model(tmp_path / name / "checkpoints/0000008.pt")[0].state_dict() for name in ("one", "two"))
    for key, value in one.items():
        assert value.isfinite().all()
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-4)
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        counts = [line["bad_steps"] for line in lines]
        assert counts[-1] == 2
        non_finite = [count > before for before, count in itertools.pairwise([0, *counts])]
        assert non_finite == [line["loss"] is None for line in lines]
    state = torch.load(tmp_path / "one/checkpoints/0000008.pt", weights_only=True)
    steps = {moments["step"].item() for moments in state["optimizer"]["state"].values()}
    assert steps == {6}, "AdamW counts only finite steps"


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path):
    rows = np.full((48, 1, 3, 8, 8), np.nan)
    write_shard(tmp_path / "f", 0, rows, np.arange(48) % 3, {})
    write_index(tmp_path / "f", 1, vae="none", scale=1.0, image_size=8, classes=["a", "b", "c"])
    flags = training_flags(tmp_path / "f", tmp_path, "nan")
    stderr = run("train_fast.py", *flags, "--max-steps=50", "--max-bad-steps=5", "--ckpt-every=2", expect=1).stderr
    assert "5 steps in a row" in stderr
    assert "the last, step 4: experts [0, 1, 2, 3, 4, 5], timesteps" in stderr
    assert "gradient norm nan" in stderr
    assert all(find_corruption(path) is None for path in checkpoints(tmp_path / "nan/checkpoints"))
