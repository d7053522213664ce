"""The benchmark runs at toy size, and its results are consistent."""

import json

from conftest import run

from common import flags

TOY = flags(toy=True, model="T/8", batch_size=4)


def test_every_part_is_measured(tmp_path):
    settings = flags(precision="fp32", compile=False, warmup=1, rounds=2, experts_per_batch=(1, 4))
    run("benchmarks/benchmark.py", *TOY, *settings, *flags(out=tmp_path, name="toy"))
    results = json.loads((tmp_path / "toy.json").read_text())
    machine = results["machine"]
    assert machine["device"] and machine["versions"] and machine["commit"]

    training = results["training"]
    assert [row["model"] for row in training] == ["DiT, the usual way", "DiT", "RemixDiT G=1", "RemixDiT G=4"]
    for row in training[1:]:
        stages = [value for key, value in row.items() if key.endswith(" %")]
        assert len(stages) == 5
        # The shares are medians, which need not sum to 100.
        assert 80 < sum(stages) < 120
        assert 0 < row["floor ms"] < row["ms/step"]
        assert row["peak GiB"] > 0
    assert training[1]["peak GiB"] < training[3]["peak GiB"]

    assert [row["model"] for row in results["sampling"]] == ["DiT", "folded", "mixed in every step"]
    assert results["data"][0]["images/s"] > 0
    assert results["extraction"][-1]["VAE busy"] > 0
    assert all(row["relative difference"] < 1e-4 for row in results["evaluator"][:-1])
    report = (tmp_path / "toy.md").read_text()
    assert "copy bandwidth" in report
    assert all(f"## {part}" in report for part in ("training", "sampling", "data", "extraction", "evaluator"))


def test_error_for_groups_that_do_not_divide_the_batch(tmp_path):
    settings = flags(experts_per_batch=(3,), parts=("training",), out=tmp_path)
    assert "does not divide" in run("benchmarks/benchmark.py", *TOY, *settings, expect=2).stderr
