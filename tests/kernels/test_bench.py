"""The kernel benchmark: what it compares is the same loss, and what it says is what it found."""

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
from gigabatch.kernels.bench.contenders import (
    BIASES,
    FAMILIES,
    ITEM,
    LOGITS,
    Contender,
    Inputs,
    contenders,
    dense,
    make_inputs,
)

CPU = torch.device("cpu")
QUICK = ("tiled", "dense", "chunked")


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GEMM_SIDES", {"cpu": 64, "cuda": 1024})


def bench(*sizes: int, lines: list[str] | None = None, **given: Any) -> dict[str, Any]:
    say = (lines if lines is not None else []).append
    options = {"peers": False, "minutes": 1.0, "say": say, "only": QUICK} | given
    return kernels.bench(CPU, sizes, [16], torch.float32, **options)


def field_of(monkeypatch: pytest.MonkeyPatch, **losses: Any) -> None:
    """Let the softmax's contenders be these, and the others have none."""
    field = [Contender(name, loss) for name, loss in losses.items()]
    monkeypatch.setattr(kernels, "contenders", lambda of, *_: field if of == "softmax" else [])


def records(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    each = [record for problem in found["problems"] for record in problem["contenders"]]
    return [record for record in each if record["name"] == name]


def exact(family: str, b: Inputs) -> Tensor:
    """Written from the definitions, with every matrix."""
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
    found = torch.autograd.grad(loss, b.leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(b.leaves, found, strict=True)]


def assert_all_agree(family: str, logits: str, compiled: bool = False) -> None:
    b = make_inputs(family, 128, 16, logits, torch.float32, CPU)
    wide = Inputs(*(leaf.detach().double().requires_grad_() for leaf in b.leaves))
    value = exact(family, wide)
    wanted = gradients(value, wide)
    field = [c for c in contenders(family, CPU, torch.float32) if not c.missing]
    chosen = [c for c in field if (c.name == "dense-compiled") == compiled]
    assert chosen
    for contender in chosen:
        loss = contender.loss(b)
        assert loss.item() == pytest.approx(value.item(), rel=1e-4), contender.name
        for got, truth in zip(gradients(loss, b), wanted, strict=True):
            assert (got - truth).norm() <= 1e-4 * truth.norm() + 1e-7, contender.name


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contenders_agree_with_the_whole_matrix(family: str, logits: str) -> None:
    assert_all_agree(family, logits)


@pytest.mark.slow
def test_the_compiled_form_agrees_with_the_whole_matrix() -> None:
    assert_all_agree("softmax", "late", compiled=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_late_logits_are_peaked_and_not_solved(family: str) -> None:
    late, early = (make_inputs(family, 2048, 64, logits, torch.float32, CPU) for logits in
                   ("late", "early"))  # fmt: skip
    assert 0.01 < exact(family, late).item() < 2
    assert exact(family, early).item() > 3
    assert late.bias.item() == BIASES["late"]
    assert torch.equal(late.q, make_inputs(family, 2048, 64, "late", torch.float32, CPU).q)


def test_the_figures_are_sane() -> None:
    lines: list[str] = []
    found = bench(64, 128, lines=lines)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(p["family"], p["n"], p["logits"]) for p in found["problems"]] == [
        (family, n, logits) for n in (64, 128) for family in FAMILIES for logits in LOGITS
    ]
    for problem in found["problems"]:
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
    assert found["environment"]["torch"] == torch.__version__
    assert not found["left_out"]
    assert len(lines) == 12 + 24
    assert found["missing"]["softmax"] == {}  # of those asked for


def test_what_cannot_run_here_is_named() -> None:
    found = bench(64, only=("tiled", "triton"))
    assert found["missing"]["sigmoid"] == {"triton": "needs a GPU"}
    assert "- `triton`: needs a GPU" in report.tables(found)


def test_a_wrong_loss_is_reported_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    field_of(monkeypatch, dense=dense, inf_cl=lambda b: 1.01 * dense(b),
             liger=lambda b: dense(b) * torch.nan)  # fmt: skip
    lines: list[str] = []
    found = bench(64, lines=lines, only=())
    json.dumps(found, allow_nan=False)
    table = report.tables(found)
    for name, how in (("inf_cl", "is 1.00% off"), ("liger", "is not finite")):
        assert all(not record["agrees"] for record in records(found, name))
        assert any(f"!!! {name} DISAGREES" in line for line in lines)
        assert f"**`{name}` (!)**" in table
        assert f"`{name}` computes another loss: at N 64, early logits, it {how}" in table
    assert "step_ms" in records(found, "inf_cl")[0]  # the figure stays
    assert check.judge_bench(found, 0)[1] is False  # another package's fault
    found["problems"][0]["contenders"][1]["name"] = "triton"
    assert check.judge_bench(found, 0)[1] is True


def test_a_wrong_gradient_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    bent = lambda b: dense(b) + b.q.sum() - b.q.sum().detach()  # noqa: E731
    field_of(monkeypatch, dense=dense, triton=bent)
    found = bench(64, only=())
    (record, _) = records(found, "triton")
    assert record["agrees"]
    assert not record["gradient_agrees"]
    table = report.tables(found)
    assert "- `triton`, N 64, early logits: its gradient is " in table
    assert "another loss" not in table
    assert check.judge_bench(found, 0)[1] is True


def test_what_fails_is_recorded_and_dropped_from_larger_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(b: Inputs) -> Tensor:
        if len(b.q) >= 128:
            raise RuntimeError("no room\nfor this")
        return dense(b)

    field_of(monkeypatch, dense=dense, liger=fails)
    found = bench(64, 128, 256, only=())
    reasons = [record["reason"] for record in records(found, "liger")]
    again = "failed at N 128: RuntimeError: no room"
    assert reasons == ["", "", "RuntimeError: no room", again, again, again]
    assert all("step_ms" in record for record in records(found, "dense"))
    assert again in report.tables(found)


def test_a_dense_form_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 20 * 64**2)
    found = bench(64, 4096, only=("dense",))
    small, large = (
        [r for p in found["problems"] if p["n"] == n for r in p["contenders"]] for n in (64, 4096)
    )
    assert all("step_ms" in record for record in small)
    assert [record["reason"] for record in large][::2] == [
        "would take 0.25 GiB", "would take 0.31 GiB",
    ]  # fmt: skip


def test_a_budget_leaves_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(64, minutes=1e-9)
    assert not found["problems"]
    assert found["left_out"][1] == "softmax, N 64, D 16, late logits"
    assert "not begun, for want of time: softmax, N 64" in report.tables(found)
    one = measure.Measure(CPU, torch.float32, time.monotonic() + 60, lambda line: None)
    one.took["softmax", 16, "dense"] = (64, 50.0)
    one.run(
        measure.Problem("softmax", 128, 16, "early", "cpu"),
        [Contender("dense", dense)],
        problems := [],
    )
    assert problems[0]["contenders"][0]["reason"].startswith("would take 800 s of ")


def test_the_largest_batch_is_the_engines_alone_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HUGE", 128)
    found = bench(64, 128)
    *_, last = found["problems"]
    assert (last["family"], last["n"], last["logits"]) == ("softmax", 128, "early")
    assert sum(problem["n"] == 128 for problem in found["problems"]) == 1
    (record,) = last["contenders"]
    assert record["name"] == "tiled"
    assert len(record["step_s"]) == 1
    assert record["forward_ms"] is None


@pytest.mark.parametrize("at", [1, 5])
def test_ctrl_c_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    calls = []

    def interrupted(b: Inputs) -> Tensor:
        calls.append(b)
        if len(calls) == at:
            raise KeyboardInterrupt
        return dense(b)

    field_of(monkeypatch, dense=dense, liger=interrupted)
    found = bench(64, 128, only=())
    assert found["stopped"] == "interrupted"
    (record,) = records(found, "liger")
    assert ("step_ms" in record) == (at > 4)
    assert record["reason"] == ("" if at > 4 else "not reached")
    assert "**stopped early: interrupted**" in report.tables(found)


def test_inputs_that_do_not_fit_end_their_problem_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(family: str, n: int, *more: Any) -> Inputs:
        if n == 128:
            raise RuntimeError("no room for inputs")
        return make_inputs(family, n, *more)

    monkeypatch.setattr(measure, "make_inputs", make)
    found = bench(64, 128, only=("tiled",))
    assert len(found["problems"]) == 12
    reasons = {record["reason"] for record in records(found, "tiled")[6:]}
    assert any(reason == "RuntimeError: no room for inputs" for reason in reasons)


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "seconds", lost)
    found = bench(64)
    assert found["stopped"].startswith("the device failed")
    assert len(found["problems"]) == 1


def test_peers_that_are_missing_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    found = {c.name: c.missing for c in peers.find_peers(CPU, 4)}
    assert found["open_clip"] == "not installed: pip install open_clip_torch"
    assert found["liger"] == "not installed: pip install liger_kernel"
    assert set(bench(64, peers=True, only=("tiled", "inf_cl"))["missing"]["softmax"]) == {"inf_cl"}


CLIP_LOSS = """
class ClipLoss:
    def __call__(self, q, k, scale):
        return scale * (q * k).sum()
"""


@pytest.mark.parametrize("source", [CLIP_LOSS, "raise OSError('one\\ntwo')"])
def test_open_clips_loss_is_read_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module")
    (package / "loss.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = next(c for c in peers.find_peers(CPU, 4) if c.name == "open_clip")
    if source != CLIP_LOSS:
        assert found.missing == "cannot be imported: OSError: one"
        return
    b = make_inputs("softmax", 32, 8, "late", torch.float32, CPU)
    assert not found.missing
    assert torch.equal(found.loss(b), b.scale * (b.q * b.k).sum())


def test_the_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    found = bench(64, 128)
    report.write(found, tmp_path)
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert sum(line.startswith("### ") for line in lines) == 3
    rows = [line for line in lines if line.startswith(("| 64 |", "| 128 |"))]
    assert len(rows) == 24
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    picture = imread(tmp_path / "kernels.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05
    found["device"] = "cuda"
    for i, problem in enumerate(found["problems"]):
        for record in problem["contenders"]:
            record["peak_bytes"] = 2**20 * (i + 1)
    report.write(found, tmp_path)
    assert imread(tmp_path / "kernels.png").shape[0] > picture.shape[0]
    assert "| 12 |" in (tmp_path / "kernels.md").read_text()
    report.write(bench(64, minutes=1e-9), tmp_path)  # nothing to draw


BAD = [
    ({"device": "tpu"}, "choose cpu or cuda"),
    ({"n": "64,x"}, "--n is '64,x'; give numbers of at least 32"),
    ({"n": ""}, "between commas"),
    ({"n": str(ITEM - 1)}, "at least 32"),
    ({"d": "0"}, "--d is '0'; give numbers of at least 1"),
    ({"dtype": "fp8"}, "choose one of bf16, fp16, fp32"),
    ({"minutes": 0}, "above 0"),
    ({"only": ["nothing"]}, "unknown; choose of tiled, triton"),
    ({"only": ["liger"]}, "add --peers"),
    ({"only": ["triton"]}, "nothing that can run here: triton needs a GPU"),
    ({"out": Path("/dev/null/folder")}, "cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.choose(**{"device": "cpu"} | given)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees none; use --device cpu"):
        kernels.choose(device="cuda")
    options = kernels.choose(only=["tiled"])
    assert options.command() == (
        "gigabatch bench kernels --device cpu --n 1024,2048,4096,8192 --d 256 --dtype fp32 "
        "--minutes 8 --only tiled"
    )


def test_the_command_line_refuses_in_words(
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
ALONE = ["gigabatch.kernels.bench.kernels"]


@pytest.mark.slow
def test_a_run_writes_its_files(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    command = [sys.executable, "-m", *LAUNCHER, "--device", "cpu", "--n", "64", "--d", "16"]
    command += ["--only", "tiled", "--only", "dense", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr
    assert "### Sigmoid loss, D = 16" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "kernels.json", "kernels.md", "kernels.png",
    ]  # fmt: skip
    found = json.loads((out / "kernels.json").read_text())
    assert found["command"].endswith("--n 64 --d 16 --dtype fp32 --minutes 8 --only tiled "
                                     "--only dense")  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_writes_what_was_found_by_the_kernels_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", *ALONE, "--device", "cpu", "--n", "1024,1100,1200,1300"]
    command += ["--only", "tiled", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("softmax, N 1,024, D 256, late"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["stopped"] == "interrupted"
    assert 1 <= len(found["problems"]) < 24
    assert "stopped early" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_check_without_a_gpu_says_so(tmp_path: Path) -> None:
    script = check.REPOSITORY / "kernels" / "bench" / "check.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("there is no GPU to check on: ")
    assert not (tmp_path / "out").exists()


def test_the_check_runs_this_checkout() -> None:
    code = "import gigabatch.kernels as k; print(k.__file__)"
    with check.checkout() as env:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        folder = env["PYTHONPATH"].split(os.pathsep)[0]
        assert done.stdout.strip() == f"{folder}/gigabatch/kernels/__init__.py"
    assert "TRITON_INTERPRET" not in env
    assert not Path(folder).exists()
    assert (check.REPOSITORY / "kernels" / "stats.py").exists()


def test_what_overruns_is_stopped_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, note = tmp_path / "log", tmp_path / "pid"
    script = f"sleep 100 & echo $! > {note}; echo begun; trap '' INT; wait"
    began = time.monotonic()
    monkeypatch.setattr(check, "GRACE_S", 0.2)
    assert check.run(["bash", "-c", script], log, 1, dict(os.environ)) is None
    assert time.monotonic() - began < 10
    assert log.read_text() == "begun\n\nstopped after 1 s\n"
    for _ in range(50):
        if not Path(f"/proc/{note.read_text().strip()}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what it started lives on")
    assert check.run(["bash", "-c", "echo more; exit 3"], log, 5, dict(os.environ)) == 3
    assert check.last_line(log) == "more"


@pytest.mark.parametrize(
    ("text", "code", "bad", "says"),
    [
        ("== ERROR SUMMARY: 0 errors", 0, False, "0 errors"),
        ("== ERROR SUMMARY: 3 errors", 9, True, "FOUND 3 ERRORS"),
        ("== ERROR SUMMARY: 1 error", 0, True, "FOUND 1 ERRORS"),
        ("Device not supported", 1, False, "did not get to its end (exit code 1)"),
        ("", None, False, "out of time"),
    ],
)
def test_the_sanitizers_verdict(text: str, code: int | None, bad: bool, says: str) -> None:
    verdict, failed = check.judge_sanitizer(text, code)
    assert failed == bad
    assert says in verdict


@pytest.mark.slow
def test_the_smoke_run_works_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gigabatch.kernels.bench.check", "--smoke"],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=570,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "smoke run: done\n"


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_back_ends_agree_and_peaks_are_measured() -> None:
    names = ("tiled", "triton", "triton-cached", "dense", "chunked")
    found = kernels.bench(torch.device("cuda"), [512], [64], torch.bfloat16, False, 3, print, names)
    assert not found["stopped"]
    for problem in found["problems"]:
        for record in problem["contenders"]:
            # Torch's own bf16 forms need not agree.
            assert record["agrees"] or not record["name"].startswith(("tiled", "triton")), record
            assert record["peak_bytes"] > 0
            assert record["step_ms"] > 0
