"""The table of `training/benchmark.py`: a row for every sampler of every case, and the rates of the steps it times."""

import json
import time

import benchmark
import pytest
import torch
from conftest import FAMILIES, one_line_error, small_config

pytestmark = pytest.mark.slow


def test_the_table_has_a_row_for_every_sampler_of_every_family(tmp_path, capsys, monkeypatch):
    cases = {family: small_config(family) for family in FAMILIES}
    monkeypatch.setattr(benchmark, "CASES", cases)
    output = tmp_path / "benchmark.json"
    words = ["--cases", *cases, "--train_cases", *cases, "--batch_sizes", "2"]
    words += ["--compiled", "false", "--train", "false"]
    benchmark.main([*words, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["(forward)", "naive*", "cropped*", "cached", "fixed_point"] * len(cases)
    assert all(row["seconds"] > 0 and row["forwards"] > 0 for row in rows)
    table = capsys.readouterr().out
    for family in cases:
        assert table.count(f"\n{family} ") == 5


def test_what_compiling_takes_is_not_the_time_of_a_forward(monkeypatch):
    calls = []

    def compiled(x):
        calls.append(x)
        if len(calls) < 3:  # as if it compiled, and compiled again
            time.sleep(0.3)

    monkeypatch.setattr(benchmark, "SLOW_FORWARD", 0.05)
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled)
    assert benchmark.compiled_seconds(None, lambda network: network(0), torch.device("cpu")) < 0.05
    assert len(calls) > 4


def test_training_rates_count_images_and_products(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # takes half a minute
    rates = benchmark.training_rates(small_config("pixelcnn_pp", num_classes=3), 4, torch.device("cpu"))
    assert list(rates) == ["eager", "fast"]
    for rate in rates.values():
        assert rate["images_per_second"] > 0
        assert rate["images_per_cpu_second"] > 0
        assert 0 < rate["share_of_matrix_rate"] < 1
        assert 0 < rate["product_share"] < 1


def test_the_benchmark_names_its_cases():
    assert "unknown case 'huge'; known are gated-pixelcnn" in one_line_error(benchmark.main, ["--cases", "huge"])
    assert "known are grey, " in one_line_error(benchmark.main, ["--train_cases", "pixelcnn-mnist-binary"])
    assert "--dtype must be float32" in one_line_error(benchmark.main, ["--dtype", "int8"])
