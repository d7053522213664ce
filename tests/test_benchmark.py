"""The benchmark runs, at toy size, and its figures hang together."""

import json

from conftest import run


def test_every_part_is_measured(tmp_path):
    flags = ("--toy", "--model", "T/8", "--precision", "fp32", "--no-compile", "--warmup", 1, "--rounds", 2)
    run(
        "benchmarks/benchmark.py",
        *flags,
        "--batch-size",
        4,
        "--experts-per-batch",
        1,
        4,
        "--out",
        tmp_path,
        "--name",
        "toy",
    )
    found = json.loads((tmp_path / "toy.json").read_text())
    assert found["machine"]["device"] and found["machine"]["versions"] and found["machine"]["commit"]
    assert [row["model"] for row in found["training"]] == ["DiT, the usual way", "DiT", "RemixDiT G=1", "RemixDiT G=4"]
    for row in found["training"][1:]:
        stages = [row[f"{stage} %"] for stage in ("forward", "backward", "checks", "optimizer", "ema")]
        assert 80 < sum(stages) < 120  # medians need not add up
        assert 0 < row["floor ms"] < row["ms/step"]
        assert row["peak GiB"] > 0
    assert found["training"][1]["peak GiB"] < found["training"][3]["peak GiB"]
    assert [row["model"] for row in found["sampling"]] == ["DiT", "folded", "mixed in every step"]
    assert found["data"][0]["images/s"] > 0
    assert found["extraction"][-1]["VAE busy"] > 0
    assert all(row["apart (relative)"] < 1e-4 for row in found["evaluator"][:-1])
    report = (tmp_path / "toy.md").read_text()
    assert "copy bandwidth" in report
    assert all(f"## {part}" in report for part in ("training", "sampling", "data", "extraction", "evaluator"))


def test_groups_that_do_not_divide_the_batch_are_refused(tmp_path):
    flags = ("--toy", "--model", "T/8", "--batch-size", 4, "--experts-per-batch", 3, "--parts", "training")
    assert "does not divide" in run("benchmarks/benchmark.py", *flags, "--out", tmp_path, expect=2).stderr
