"""The kernel benchmark and the GPU check: compared losses are equal, and reports are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import needs_gpu
from torch import Tensor

from gigabatch.kernels.bench import check, kernels, machine, measure, peers, report
from gigabatch.kernels.bench.implementations import (
    BIASES,
    FAMILIES,
    ITEM,
    LOGITS,
    Implementation,
    Inputs,
    dense,
    implementations,
    make_inputs,
)

CPU = torch.device("cpu")
QUICK = ("tiled", "dense", "chunked")


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GEMM_SIDES", {"cpu": 64, "cuda": 1024})


def bench(*sizes: int, lines: list[str] | None = None, **overrides: Any) -> dict[str, Any]:
    log = (lines if lines is not None else []).append
    options = {"peers": False, "minutes": 1.0, "say": log, "only": QUICK} | overrides
    return kernels.bench(CPU, sizes, [16], torch.float32, **options)


def use_implementations(monkeypatch: pytest.MonkeyPatch, **losses: Any) -> None:
    """Replace the softmax's implementations by these; the other families get none."""
    softmax = [Implementation(name, loss) for name, loss in losses.items()]
    monkeypatch.setattr(
        kernels, "implementations", lambda family, *_: softmax if family == "softmax" else []
    )


def records(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    problems = results["problems"]
    return [r for problem in problems for r in problem["contenders"] if r["name"] == name]


def exact(family: str, b: Inputs) -> Tensor:
    """Compute the loss by its definition, with dense matrices."""
    if family == "maxsim":
        scores = torch.einsum("itd,jud->ijtu", b.q, b.k).amax(3).mean(2)
        logits = b.scale * scores
        return (logits.logsumexp(1) - logits.diagonal()).mean()
    logits = b.scale * b.q @ b.k.T
    if family == "sigmoid":
        signs = 2 * torch.eye(len(b.q), dtype=torch.float64) - 1
        return F.softplus(-signs * (logits + b.bias)).sum() / len(b.q)
    both = (logits.logsumexp(1) + logits.logsumexp(0)) / 2
    return (both - logits.diagonal()).mean()


def gradients(loss: Tensor, b: Inputs) -> list[Tensor]:
    grads = torch.autograd.grad(loss, b.leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(b.leaves, grads, strict=True)]


def assert_all_agree(family: str, logits: str, compiled: bool = False) -> None:
    b = make_inputs(family, 128, 16, logits, torch.float32, CPU)
    wide = Inputs(*(leaf.detach().double().requires_grad_() for leaf in b.leaves))
    value = exact(family, wide)
    expected = gradients(value, wide)
    available = [one for one in implementations(family, CPU, torch.float32) if not one.missing]
    chosen = [one for one in available if (one.name == "dense-compiled") == compiled]
    assert chosen
    for implementation in chosen:
        loss = implementation.loss(b)
        assert loss.item() == pytest.approx(value.item(), rel=1e-4), implementation.name
        for actual, exact_grad in zip(gradients(loss, b), expected, strict=True):
            error = (actual - exact_grad).norm()
            assert error <= 1e-4 * exact_grad.norm() + 1e-7, implementation.name


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_equal_the_definition(family: str, logits: str) -> None:
    assert_all_agree(family, logits)


@pytest.mark.slow
def test_compiled_form_equals_the_definition() -> None:
    assert_all_agree("softmax", "late", compiled=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_late_inputs_have_peaked_logits_and_nonzero_loss(family: str) -> None:
    late, early = (make_inputs(family, 2048, 64, logits, torch.float32, CPU) for logits in
                   ("late", "early"))  # fmt: skip
    assert 0.01 < exact(family, late).item() < 2
    assert exact(family, early).item() > 3
    assert late.bias.item() == BIASES["late"]
    assert torch.equal(late.q, make_inputs(family, 2048, 64, "late", torch.float32, CPU).q)


def test_results_are_consistent() -> None:
    lines: list[str] = []
    results = bench(64, 128, lines=lines)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert [(p["family"], p["n"], p["logits"]) for p in results["problems"]] == [
        (family, n, logits) for n in (64, 128) for family in FAMILIES for logits in LOGITS
    ]
    for problem in results["problems"]:
        passes = 4 if problem["family"] == "softmax" else 3
        assert problem["flops"] == passes * 2 * problem["n"] ** 2 * 16
        names = {record["name"] for record in problem["contenders"]}
        assert names == {"tiled", "chunked" if problem["family"] == "maxsim" else "dense"}
        for record in problem["contenders"]:
            assert record["agrees"]
            assert record["gradient_difference"] < 1e-3
            assert len(record["step_s"]) == len(record["forward_s"]) >= 2
            assert min(record["step_s"]) <= record["step_ms"] / 1e3 <= max(record["step_s"])
            share = problem["flops"] / (record["step_ms"] / 1e3) / problem["gemm_flops_per_s"]
            assert record["share_of_matmul"] == pytest.approx(share)
            assert record["peak_bytes"] is None
    assert results["environment"]["torch"] == torch.__version__
    assert not results["left_out"]
    assert len(lines) == 12 + 24
    assert results["missing"]["softmax"] == {}  # only selected implementations are listed


def test_missing_implementation_is_listed_with_reason() -> None:
    results = bench(64, only=("tiled", "triton"))
    assert results["missing"]["sigmoid"] == {"triton": "needs a GPU"}
    assert "- `triton`: needs a GPU" in report.tables(results)


def test_wrong_loss_is_reported_and_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    use_implementations(monkeypatch, dense=dense, inf_cl=lambda b: 1.01 * dense(b),
             liger=lambda b: dense(b) * torch.nan)  # fmt: skip
    lines: list[str] = []
    results = bench(64, lines=lines, only=())
    json.dumps(results, allow_nan=False)
    table = report.tables(results)
    for name, text in (("inf_cl", "differs by 1.00%"), ("liger", "is not finite")):
        assert all(not record["agrees"] for record in records(results, name))
        assert any(f"!!! {name} DISAGREES" in line for line in lines)
        assert f"**`{name}` (!)**" in table
        assert f"`{name}` computes a different loss: at N 64, early logits, it {text}" in table
    assert "step_ms" in records(results, "inf_cl")[0]  # its time is still reported
    assert check.judge_bench(results, 0)[1] is False  # another package's error is no failure
    results["problems"][0]["contenders"][1]["name"] = "triton"
    assert check.judge_bench(results, 0)[1] is True


def test_wrong_gradient_is_reported_and_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_gradient = lambda b: dense(b) + b.q.sum() - b.q.sum().detach()  # noqa: E731
    use_implementations(monkeypatch, dense=dense, triton=wrong_gradient)
    results = bench(64, only=())
    (record, _) = records(results, "triton")
    assert record["agrees"]
    assert not record["gradient_agrees"]
    table = report.tables(results)
    assert "- `triton`, N 64, early logits: its gradient differs by " in table
    assert "another loss" not in table
    assert check.judge_bench(results, 0)[1] is True


def test_failed_implementation_is_skipped_at_larger_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(b: Inputs) -> Tensor:
        if len(b.q) >= 128:
            raise RuntimeError("no room\nfor this")
        return dense(b)

    use_implementations(monkeypatch, dense=dense, liger=failing)
    results = bench(64, 128, 256, only=())
    reasons = [record["reason"] for record in records(results, "liger")]
    skip_reason = "failed at N 128: RuntimeError: no room"
    assert reasons == ["", "", "RuntimeError: no room", skip_reason, skip_reason, skip_reason]
    assert all("step_ms" in record for record in records(results, "dense"))
    assert skip_reason in report.tables(results)


def test_dense_form_beyond_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 20 * 64**2)
    results = bench(64, 4096, only=("dense",))
    small, large = (
        [r for p in results["problems"] if p["n"] == n for r in p["contenders"]] for n in (64, 4096)
    )
    assert all("step_ms" in record for record in small)
    assert [record["reason"] for record in large][::2] == [
        "would take 0.25 GiB", "would take 0.31 GiB",
    ]  # fmt: skip


def test_problems_beyond_the_time_budget_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = bench(64, minutes=1e-9)
    assert not results["problems"]
    assert results["left_out"][1] == "softmax, N 64, D 16, late logits"
    assert "not started, out of time: softmax, N 64" in report.tables(results)
    runner = measure.Measure(CPU, torch.float32, time.monotonic() + 60, lambda line: None)
    runner.took["softmax", 16, "dense"] = (64, 50.0)
    runner.run(
        measure.Problem("softmax", 128, 16, "early", "cpu"),
        [Implementation("dense", dense)],
        problems := [],
    )
    assert problems[0]["contenders"][0]["reason"].startswith("would take 800 s of ")


def test_largest_batch_runs_the_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HUGE", 128)
    results = bench(64, 128)
    *_, last = results["problems"]
    assert (last["family"], last["n"], last["logits"]) == ("softmax", 128, "early")
    assert sum(problem["n"] == 128 for problem in results["problems"]) == 1
    (record,) = last["contenders"]
    assert record["name"] == "tiled"
    assert len(record["step_s"]) == 1
    assert record["forward_ms"] is None


@pytest.mark.parametrize("at", [1, 5])
def test_ctrl_c_keeps_results_so_far(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    calls = []

    def interrupted(b: Inputs) -> Tensor:
        calls.append(b)
        if len(calls) == at:
            raise KeyboardInterrupt
        return dense(b)

    use_implementations(monkeypatch, dense=dense, liger=interrupted)
    results = bench(64, 128, only=())
    assert results["stopped"] == "interrupted"
    (record,) = records(results, "liger")
    assert ("step_ms" in record) == (at > 4)
    assert record["reason"] == ("" if at > 4 else "not reached")
    assert "**stopped early: interrupted**" in report.tables(results)


def test_inputs_beyond_memory_end_only_their_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(family: str, n: int, *more: Any) -> Inputs:
        if n == 128:
            raise RuntimeError("no room for inputs")
        return make_inputs(family, n, *more)

    monkeypatch.setattr(measure, "make_inputs", make)
    results = bench(64, 128, only=("tiled",))
    assert len(results["problems"]) == 12
    reasons = {record["reason"] for record in records(results, "tiled")[6:]}
    assert any(reason == "RuntimeError: no room for inputs" for reason in reasons)


def test_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "seconds", lost)
    results = bench(64)
    assert results["stopped"].startswith("the device failed")
    assert len(results["problems"]) == 1


def test_missing_peers_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    missing = {c.name: c.missing for c in peers.find_peers(CPU, 4)}
    assert missing["open_clip"] == "not installed: pip install open_clip_torch"
    assert missing["liger"] == "not installed: pip install liger_kernel"
    assert set(bench(64, peers=True, only=("tiled", "inf_cl"))["missing"]["softmax"]) == {"inf_cl"}


CLIP_LOSS = """
class ClipLoss:
    def __call__(self, q, k, scale):
        return scale * (q * k).sum()
"""


@pytest.mark.parametrize("source", [CLIP_LOSS, "raise OSError('one\\ntwo')"])
def test_open_clip_loss_loads_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module")
    (package / "loss.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    open_clip = next(c for c in peers.find_peers(CPU, 4) if c.name == "open_clip")
    if source != CLIP_LOSS:
        assert open_clip.missing == "cannot be imported: OSError: one"
        return
    b = make_inputs("softmax", 32, 8, "late", torch.float32, CPU)
    assert not open_clip.missing
    assert torch.equal(open_clip.loss(b), b.scale * (b.q * b.k).sum())


def test_report_writes_tables_and_a_plot(tmp_path: Path) -> None:
    from matplotlib.image import imread

    results = bench(64, 128)
    report.write(results, tmp_path)
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert sum(line.startswith("### ") for line in lines) == 3
    rows = [line for line in lines if line.startswith(("| 64 |", "| 128 |"))]
    assert len(rows) == 24
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    picture = imread(tmp_path / "kernels.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05
    results["device"] = "cuda"
    for i, problem in enumerate(results["problems"]):
        for record in problem["contenders"]:
            record["peak_bytes"] = 2**20 * (i + 1)
    report.write(results, tmp_path)
    assert imread(tmp_path / "kernels.png").shape[0] > picture.shape[0]
    assert "| 12 |" in (tmp_path / "kernels.md").read_text()
    report.write(bench(64, minutes=1e-9), tmp_path)  # nothing to draw


INVALID = [
    ({"device": "tpu"}, "choose cpu or cuda"),
    ({"n": "64,x"}, "--n is '64,x'; give numbers of at least 32"),
    ({"n": ""}, "separated by commas"),
    ({"n": str(ITEM - 1)}, "at least 32"),
    ({"d": "0"}, "--d is '0'; give numbers of at least 1"),
    ({"dtype": "fp8"}, "choose one of bf16, fp16, fp32"),
    ({"minutes": 0}, "above 0"),
    ({"only": ["nothing"]}, "unknown; choose from tiled, triton"),
    ({"only": ["liger"]}, "add --peers"),
    ({"only": ["triton"]}, "nothing in --only can run here: triton needs a GPU"),
    ({"out": Path("/dev/null/folder")}, "cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID)
def test_invalid_options_raise_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.choose(**{"device": "cpu"} | arguments)


def test_device_cuda_without_gpu_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees none; use --device cpu"):
        kernels.choose(device="cuda")
    options = kernels.choose(only=["tiled"])
    assert options.command() == (
        "gigabatch bench kernels --device cpu --n 1024,2048,4096,8192 --d 256 --dtype fp32 "
        "--minutes 8 --only tiled"
    )


def test_command_line_prints_invalid_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gigabatch.launcher.cli.app import main

    monkeypatch.setattr(sys, "argv", ["gigabatch", "bench", "kernels", "--dtype", "int4"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "gigabatch: --dtype is 'int4'; choose one of bf16, fp16, fp32\n"
    )


LAUNCHER = ["gigabatch.launcher", "bench", "kernels"]
MODULE = ["gigabatch.kernels.bench.kernels"]


@pytest.mark.slow
def test_command_writes_its_files(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    command = [sys.executable, "-m", *LAUNCHER, "--device", "cpu", "--n", "64", "--d", "16"]
    command += ["--only", "tiled", "--only", "dense", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr
    assert "### Sigmoid loss, D = 16" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "kernels.json", "kernels.md", "kernels.png",
    ]  # fmt: skip
    results = json.loads((out / "kernels.json").read_text())
    assert results["command"].endswith("--n 64 --d 16 --dtype fp32 --minutes 8 --only tiled "
                                     "--only dense")  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_writes_results_so_far(tmp_path: Path) -> None:
    command = [sys.executable, "-m", *MODULE, "--device", "cpu", "--n", "1024,1100,1200,1300"]
    command += ["--only", "tiled", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("softmax, N 1,024, D 256, late"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert results["stopped"] == "interrupted"
    assert 1 <= len(results["problems"]) < 24
    assert "stopped early" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_check_without_gpu_exits_with_2(tmp_path: Path) -> None:
    script = check.REPOSITORY / "kernels" / "bench" / "check.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU to check: ")
    assert not (tmp_path / "out").exists()


def test_check_imports_this_checkout() -> None:
    code = "import gigabatch.kernels as k; print(k.__file__)"
    with check.checkout() as env:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        folder = env["PYTHONPATH"].split(os.pathsep)[0]
        assert done.stdout.strip() == f"{folder}/gigabatch/kernels/__init__.py"
    assert "TRITON_INTERPRET" not in env
    assert not Path(folder).exists()
    assert (check.REPOSITORY / "kernels" / "stats.py").exists()


def test_check_stops_a_command_and_its_children_at_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, pid_file = tmp_path / "log", tmp_path / "pid"
    script = f"sleep 100 & echo $! > {pid_file}; echo begun; trap '' INT; wait"
    start = time.monotonic()
    monkeypatch.setattr(check, "GRACE_S", 0.2)
    assert check.run(["bash", "-c", script], log, 1, dict(os.environ)) is None
    assert time.monotonic() - start < 10
    assert log.read_text() == "begun\n\nstopped after 1 s\n"
    for _ in range(50):
        if not Path(f"/proc/{pid_file.read_text().strip()}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child process still runs")
    assert check.run(["bash", "-c", "echo more; exit 3"], log, 5, dict(os.environ)) == 3
    assert check.last_line(log) == "more"


@pytest.mark.parametrize(
    ("text", "code", "failure", "message"),
    [
        ("== ERROR SUMMARY: 0 errors", 0, False, "0 errors"),
        ("== ERROR SUMMARY: 3 errors", 9, True, "FOUND 3 ERRORS"),
        ("== ERROR SUMMARY: 1 error", 0, True, "FOUND 1 ERRORS"),
        ("Device not supported", 1, False, "did not finish (exit code 1)"),
        ("", None, False, "time limit"),
    ],
)
def test_sanitizer_verdict(text: str, code: int | None, failure: bool, message: str) -> None:
    verdict, failed = check.judge_sanitizer(text, code)
    assert failed == failure
    assert message in verdict


@pytest.mark.slow
def test_smoke_run_passes_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gigabatch.kernels.bench.check", "--smoke"],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=570,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "smoke run: done\n"


@pytest.mark.gpu
@needs_gpu
def test_back_ends_agree_and_peaks_are_measured_on_gpu() -> None:
    names = ("tiled", "triton", "triton-cached", "dense", "chunked")
    results = kernels.bench(
        torch.device("cuda"), [512], [64], torch.bfloat16, False, 3, print, names
    )
    assert not results["stopped"]
    for problem in results["problems"]:
        for record in problem["contenders"]:
            # Plain torch in bf16 need not agree.
            assert record["agrees"] or not record["name"].startswith(("tiled", "triton")), record
            assert record["peak_bytes"] > 0
            assert record["step_ms"] > 0
