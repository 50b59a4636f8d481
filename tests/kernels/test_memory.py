"""Peak memory, measured in fresh processes: linear in the batch for all that the engine can do."""

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
tiled.ROWS, tiled.COLUMNS = 128, 512  # so small that tiles do not hide what grows
print(json.dumps({name: measure(name, int(sys.argv[1]), 16)["peak_mib"] for name in sys.argv[2:]}))
"""


def peaks(n: int, names: list[str]) -> dict[str, float]:
    command = [sys.executable, "-c", ALL, str(n), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_clause_score_and_source_is_linear() -> None:
    names = [name for name in PROBLEMS if name not in DENSE]
    found = [peaks(n, names) for n in SIZES]
    for name in names:
        extra = [max(one[name], 4.0) for one in found]  # MiB; less is the allocator's noise
        # One byte a pair would be 36 MiB at the largest size.
        assert extra[-1] < 24, (name, extra)
        assert fit_exponent(SIZES, extra) <= 1.1, (name, extra)


def test_a_dense_mask_would_be_noticed() -> None:
    found = [measure_afresh("dense", n, 16, threads=1)["peak_mib"] for n in SIZES]
    assert fit_exponent(SIZES, found) > 1.7
    assert found[-1] * MIB > 3 * 4 * SIZES[-1] ** 2


def test_late_interaction_holds_no_token_matrix() -> None:
    keys = (192, 384, 768)
    found = [measure_afresh("maxsim", n, 16, threads=1)["peak_mib"] for n in keys]
    # The token products of 256 x 768 items are 1.5 GiB.
    assert max(found) < 64
    assert fit_exponent(keys, found) <= 1.1


def test_the_peak_of_the_ring_does_not_grow_with_the_world() -> None:
    three, four = ring_peaks(3), ring_peaks(4)
    assert four < 1.1 * three + 2
    assert ring_peaks(4, "gather") > four + 8


def test_problems_that_are_dense_and_not_agree() -> None:
    batches = [Batch(64, 8) for _ in range(5)]
    names = ("contrastive", "dense", "dense, one matrix", "sigmoid", "dense sigmoid")
    values = [step(name, batch) for name, batch in zip(names, batches, strict=True)]
    assert values[:2] == pytest.approx([values[2]] * 2, rel=1e-5)
    assert values[3] == pytest.approx(values[4], rel=1e-5)


def test_the_command_line_measures() -> None:
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
