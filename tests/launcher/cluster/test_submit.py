"""What is checked before a job is sent: the config, the user's modules, the address, the token."""

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


def test_the_config_travels_resolved_with_the_command_quoted(tiny: Path) -> None:
    path = tiny.rename(tiny.with_name("it's; $(mine).yaml"))
    job = train_job(path, ["train.steps=7", "cluster.threads=0"], [])
    assert shlex.split(job.entrypoint) == [
        "exec", "python", "-m", "gigabatch.launcher", "train", "it-s----mine-.yaml",
    ]  # fmt: skip
    config = parse_config(job.files["it-s----mine-.yaml"], "sent")
    assert config.train.steps == 7
    assert config.run.dir.is_absolute()
    assert config.cluster.threads == 0  # pinned there: this machine's cores say nothing of it


def test_a_job_that_is_stopped_gets_the_time_that_its_run_asks_for(tiny: Path) -> None:
    assert train_job(tiny, ["cluster.grace_s=600"], []).stop_s > 600
    assert resume_job("/shared/a", ["cluster.grace_s=599.5"], [], []).stop_s > 600


def test_arguments_of_a_resume_are_quoted() -> None:
    override = "objective.positives=a b; 'c'"
    job = resume_job("/shared/my runs/a", [override], ["train.steps"], [])
    assert shlex.split(job.entrypoint)[4:] == [
        "resume", "/shared/my runs/a", override, "--allow=train.steps",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.stepz=3"], "train.steps"),
        ([tower("nowhere.towers:Tower")], "--with PATH"),
        ([tower("mine.deep.other:Tower")], "holds no module mine.deep.other"),
        ([tower("mine.deep.towers:Other")], "defines no Other"),
        ([tower("json:JSONDecoder")], "Python's own"),
        (["data.stages=[mine.missing:stage]"], "data.stages: 'mine.missing:stage'"),
    ],
)
def test_what_would_fail_there_is_found_here(
    tiny: Path, package: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(GigabatchError, match=told.replace("(", r"\(")):
        train_job(tiny, overrides, [package])


def test_modules_that_are_sent_or_installed_are_found(tiny: Path, package: Path) -> None:
    alone = package.parent / "alone.py"
    alone.write_text("from torch.nn import Linear as Line\nif True:\n    Other = Line\n")
    sent = [package, alone]
    for module in ("mine.deep.towers:Tower", "alone:Line", "alone:Other", "torch.nn:Linear"):
        assert train_job(tiny, [tower(module)], sent).modules == tuple(sent)


def test_a_module_that_is_only_here_is_named_with_what_to_add(
    tiny: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(GigabatchError, match=f"Add --with {package}"):
        train_job(tiny, [tower("mine.deep.towers:Tower")], [])


def test_what_cannot_be_sent_is_refused(tiny: Path, package: Path, tmp_path: Path) -> None:
    notes, dashed = tmp_path / "notes.txt", tmp_path / "my-towers.py"
    notes.touch()
    dashed.touch()
    for paths, told in [
        ([tmp_path / "gone.py"], "no such file"),
        ([notes], "neither a .py file nor the folder"),
        ([dashed], "no name that Python can import"),
        ([package, package], "both called mine"),
    ]:
        with pytest.raises(GigabatchError, match=told):
            train_job(tiny, [], paths)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("address", ["http://203.0.113.7:8265", "head.cluster:8265"])
def test_a_cluster_beyond_this_machine_needs_a_token(no_token: Path, address: str) -> None:
    with pytest.raises(GigabatchError, match=r"RAY_AUTH_MODE=token.*--insecure"):
        connect(address)


def test_a_mode_without_a_token_is_refused(no_token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(GigabatchError, match="no token was found"):
        connect("http://127.0.0.1:8265", insecure=True)


def test_the_token_is_taken_from_the_same_places_as_rays_own(
    no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert auth_token() is None
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("of-home\n")
    assert auth_token() == "of-home"
    named = no_token / "named"
    named.write_text("of-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert auth_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert auth_token() == "of-variable"


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "http://", "http://head:port", "http://user:word@head:8265"]
)
def test_an_address_that_is_none_is_refused(no_token: Path, address: str) -> None:
    with pytest.raises(GigabatchError, match="dashboard"):
        connect(address)


def test_a_cluster_that_is_not_there_is_said_so(no_token: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(GigabatchError, match="no cluster answers there"):
            connect(f"http://127.0.0.1:{taken.getsockname()[1]}")
