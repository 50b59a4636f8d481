"""Peak memory, measured in new processes: linear in the batch for every use of the engine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gigabatch.kernels.bench.engine import fit_exponent
from gigabatch.kernels.bench.memory import MIB, measure, measure_afresh
from gigabatch.kernels.bench.problems import DENSE, PROBLEMS, Batch, step
from gigabatch.kernels.bench.ring import ring_peaks

pytestmark = pytest.mark.slow
SIZES = (2048, 4096, 6144)
ALL = """
import json, sys, torch
from gigabatch.kernels import tiled
from gigabatch.kernels.bench.memory import measure
torch.set_num_threads(1)
tiled.ROWS, tiled.COLUMNS = 128, 512  # so small that tiles do not hide growth
print(json.dumps({name: measure(name, int(sys.argv[1]), 16)["peak_mib"] for name in sys.argv[2:]}))
"""


def peaks(n: int, names: list[str]) -> dict[str, float]:
    command = [sys.executable, "-c", ALL, str(n), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_of_every_problem_is_linear_in_batch() -> None:
    names = [name for name in PROBLEMS if name not in DENSE]
    by_size = [peaks(n, names) for n in SIZES]
    for name in names:
        extra = [max(mib[name], 4.0) for mib in by_size]  # below 4 MiB the allocator's noise shows
        # One byte per pair would be 36 MiB at the largest size.
        assert extra[-1] < 24, (name, extra)
        assert fit_exponent(SIZES, extra) <= 1.1, (name, extra)


def test_memory_of_dense_form_is_quadratic() -> None:
    peak_mib = [measure_afresh("dense", n, 16, threads=1)["peak_mib"] for n in SIZES]
    assert fit_exponent(SIZES, peak_mib) > 1.7
    assert peak_mib[-1] * MIB > 3 * 4 * SIZES[-1] ** 2


def test_maxsim_memory_is_below_the_token_matrix() -> None:
    keys = (192, 384, 768)
    peak_mib = [measure_afresh("maxsim", n, 16, threads=1)["peak_mib"] for n in keys]
    # The token products of 256 x 768 items are 1.5 GiB.
    assert max(peak_mib) < 64
    assert fit_exponent(keys, peak_mib) <= 1.1


def test_ring_peak_does_not_grow_with_world_size() -> None:
    three, four = ring_peaks(3), ring_peaks(4)
    assert four < 1.1 * three + 2
    assert ring_peaks(4, "gather") > four + 8


def test_engine_problems_equal_dense_problems() -> None:
    batches = [Batch(64, 8) for _ in range(5)]
    names = ("contrastive", "dense", "dense, one matrix", "sigmoid", "dense sigmoid")
    values = [step(name, batch) for name, batch in zip(names, batches, strict=True)]
    assert values[:2] == pytest.approx([values[2]] * 2, rel=1e-5)
    assert values[3] == pytest.approx(values[4], rel=1e-5)


def test_bench_memory_command_prints_peak() -> None:
    assert measure("ids", 512, 8)["peak_mib"] < 64
    command = [sys.executable, "-m", "gigabatch.launcher", "bench", "memory"]
    done = subprocess.run(
        [*command, "exclude", "--n", "512", "--d", "8"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "MiB above inputs and gradients" in done.stdout
    unknown = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "there is no problem 'nothing'" in unknown.stderr
