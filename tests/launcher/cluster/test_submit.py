"""Checks before a job is submitted: config, user modules, address, token."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cluster.connection import auth_token, connect
from gigabatch.launcher.cluster.submit import resume_job, train_job
from gigabatch.trainer.config.load import parse_config


def tower(module: str) -> str:
    return f"towers.image={{kind: module, module: '{module}'}}"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "deep" / "__init__.py").touch()
    (folder / "deep" / "towers.py").write_text("class Tower: ...\n")
    return folder


def test_job_holds_resolved_config_and_quoted_command(tiny: Path) -> None:
    path = tiny.rename(tiny.with_name("it's; $(mine).yaml"))
    job = train_job(path, ["train.steps=7", "cluster.threads=0"], [])
    assert shlex.split(job.entrypoint) == [
        "exec", "python", "-m", "gigabatch.launcher", "train", "it-s----mine-.yaml",
    ]  # fmt: skip
    config = parse_config(job.files["it-s----mine-.yaml"], "sent")
    assert config.train.steps == 7
    assert config.run.dir.is_absolute()
    assert config.cluster.threads == 0  # resolved on the cluster, from its number of cores


def test_stop_timeout_exceeds_grace_period_of_run(tiny: Path) -> None:
    assert train_job(tiny, ["cluster.grace_s=600"], []).stop_s > 600
    assert resume_job("/shared/a", ["cluster.grace_s=599.5"], [], []).stop_s > 600


def test_resume_arguments_are_quoted() -> None:
    override = "objective.positives=a b; 'c'"
    job = resume_job("/shared/my runs/a", [override], ["train.steps"], [])
    assert shlex.split(job.entrypoint)[4:] == [
        "resume", "/shared/my runs/a", override, "--allow=train.steps",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "train.steps"),
        ([tower("missing.towers:Tower")], "--with PATH"),
        ([tower("mine.deep.other:Tower")], "there is no module mine.deep.other in"),
        ([tower("mine.deep.towers:Other")], "does not define Other"),
        ([tower("json:JSONDecoder")], "json is a module of Python"),
        (["data.stages=[mine.missing:stage]"], "data.stages: 'mine.missing:stage'"),
    ],
)
def test_invalid_config_or_missing_code_fails_before_submission(
    tiny: Path, package: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(GigabatchError, match=message.replace("(", r"\(")):
        train_job(tiny, overrides, [package])


def test_sent_and_installed_modules_are_accepted(tiny: Path, package: Path) -> None:
    single = package.parent / "single.py"
    single.write_text("from torch.nn import Linear as Line\nif True:\n    Other = Line\n")
    paths = [package, single]
    for module in ("mine.deep.towers:Tower", "single:Line", "single:Other", "torch.nn:Linear"):
        assert train_job(tiny, [tower(module)], paths).modules == tuple(paths)


def test_unsent_local_module_is_reported_with_option_to_add(
    tiny: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(GigabatchError, match=f"Add --with {package}"):
        train_job(tiny, [tower("mine.deep.towers:Tower")], [])


def test_invalid_module_paths_are_rejected(tiny: Path, package: Path, tmp_path: Path) -> None:
    notes, dashed = tmp_path / "notes.txt", tmp_path / "my-towers.py"
    notes.touch()
    dashed.touch()
    for paths, message in [
        ([tmp_path / "missing.py"], "no such file"),
        ([notes], "neither a .py file nor the folder"),
        ([dashed], "is not an importable module name"),
        ([package, package], "two paths have the same name mine"),
    ]:
        with pytest.raises(GigabatchError, match=message):
            train_job(tiny, [], paths)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("address", ["http://203.0.113.7:8265", "head.cluster:8265"])
def test_cluster_on_another_machine_needs_a_token(no_token: Path, address: str) -> None:
    with pytest.raises(GigabatchError, match=r"RAY_AUTH_MODE=token.*--insecure"):
        connect(address)


def test_token_mode_without_token_fails(no_token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(GigabatchError, match="no token was found"):
        connect("http://127.0.0.1:8265", insecure=True)


def test_token_sources_and_their_order_match_ray(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert auth_token() is None
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("of-home\n")
    assert auth_token() == "of-home"
    file = no_token / "token"
    file.write_text("of-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert auth_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert auth_token() == "of-variable"


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://", "http://head:port", "http://user:word@head:8265"]
)
def test_invalid_address_is_rejected(no_token: Path, address: str) -> None:
    with pytest.raises(GigabatchError, match="dashboard"):
        connect(address)


def test_unreachable_cluster_is_reported(no_token: Path) -> None:
    with socket.socket() as bound:  # bound but not listening
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(GigabatchError, match="no cluster responds"):
            connect(f"http://127.0.0.1:{bound.getsockname()[1]}")
