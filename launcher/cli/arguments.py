"""Arguments that several commands share. Paths are checked while the line is parsed, before a
command imports torch, so that a typing error is reported at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError


def _config(name: Path | None) -> Path | None:
    from gigabatch.launcher.recipes import find_config

    return None if name is None else find_config(str(name))


def _run(name: str) -> str:
    """Return the path of a run; return a URL of copied checkpoints unchanged."""
    from gigabatch.trainer.run.find import find_run

    return name if "://" in name else str(find_run(name))


def check_shards(source: str) -> str:
    """Return `source`, which must name shards or a filtered view.

    Raises:
        GigabatchError: if there is nothing, or data that must be packed first.
    """
    from gigabatch.data.shards.pack_hint import pack_hint

    if hint := pack_hint(source):
        raise GigabatchError(f"{source}: {hint}")
    return check_exists(source)


def check_exists(source: str) -> str:
    """Return `source`, which must be a URL, or a local path or pattern that matches something.

    Raises:
        GigabatchError: if nothing matches, or a URL's scheme is not supported.
    """
    if not os.path.exists(source):
        from gigabatch.data.remote.locations import expand, is_remote

        if not is_remote(source):
            expand([source])
    return source


def check_data_root(config: Path, overrides: Sequence[str]) -> None:
    """Check `data.root` as it is written; reading all keys needs torch, which takes seconds.

    Raises:
        GigabatchError: if it is a local path that is no folder.
    """
    import yaml

    from gigabatch.data.shards.pack_hint import check_root

    try:
        # A pipe, such as /dev/stdin, can be read only once.
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        section = (yaml.safe_load(text) or {}).get("data")
        root = section.get("root") if isinstance(section, dict) else None
        for override in overrides:
            key, _, value = override.partition("=")
            if key == "data":  # replaces the section
                return
            root = yaml.safe_load(value) if key == "data.root" else root
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return  # reported when all keys are read
    if isinstance(root, str) and not root.startswith("demo:"):
        check_root(root if "://" in root else str(Path(os.path.expanduser(root)).absolute()))


def check_set(name: str | None) -> str | None:
    """Return the name of an evaluation set; an absolute path must exist.

    A relative path may be inside the run's `data.root`, which is not known here.

    Raises:
        GigabatchError: if the path does not exist.
    """
    if name is not None and os.path.isabs(os.path.expanduser(name)):
        check_exists(os.path.expanduser(name))
    return name


def _many_shards(sources: list[str]) -> list[str]:
    return [check_shards(source) for source in sources]


CONFIG_HELP = "A YAML file, or a recipe such as quickstart (`gigabatch config --list`)."
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, callback=_config)]
OptionalConfigPath = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, callback=_config)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that replace those of CONFIG, such as train.steps=100."
    ),
]
RunPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Run folder, by its path or by its name in runs/.", callback=_run
    ),
]
RunPathOrURL = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run folder, by its path or by its name in runs/; or the URL of its copied "
        "checkpoints, checkpoint.copy_to/NAME.",
        callback=_run,
    ),
]
SHARDS_HELP = (
    "Folder of .tar shards, pattern in quotes ('shards/cc-{0000..0123}.tar', "
    "'s3://bucket/*.tar'; also gs://, hf://, https://), or filtered view made by `data filter`."
)
Shards = Annotated[str, typer.Argument(metavar="SOURCE", help=SHARDS_HELP, callback=check_shards)]
ManyShards = Annotated[
    list[str], typer.Argument(metavar="SOURCE", help=SHARDS_HELP, callback=_many_shards)
]
TableOrShards = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Table (CSV, TSV, JSONL, Parquet, Arrow; a file, or a folder of files of one format) "
        "that names files or contains their bytes; or shards to be written again.",
        callback=check_exists,
    ),
]
JSON_HELP = "Print one JSON object."
