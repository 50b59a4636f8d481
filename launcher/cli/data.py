"""`gigabatch data ...`: write, index, check, describe and filter shards; print a run's batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.arguments import (
    JSON_HELP,
    ConfigPath,
    ManyShards,
    Overrides,
    Shards,
    TableOrShards,
)

data = typer.Typer(
    help="Write, index, check and describe shards.", no_args_is_help=True, rich_markup_mode=None
)
Processes = Annotated[
    int | None, typer.Option(min=1, help="Number of processes. Default: one per CPU core.")
]


@data.command()
def index(
    sources: ManyShards,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Fields of the json member to add to the index, comma-separated, such as "
            "concept,lang. Existing columns are kept.",
        ),
    ] = None,
    headers_only: Annotated[
        bool,
        typer.Option("--headers-only", help="Read only tar headers: faster, but no checksums."),
    ] = False,
    dotted: Annotated[
        bool,
        typer.Option("--dotted", help="Keep extensions that contain dots, such as left.jpg."),
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Allow samples without a member that others have.")
    ] = False,
    processes: Processes = None,
) -> int:
    """Index shards: list samples, checksum members.

    Damaged shards are rejected. Shards that were added later are indexed without reading the others
    again. Training indexes its sources by itself if needed. Exit code 2 if samples lack members.

    \b
    Examples:
      gigabatch data index /data/pairs/train --columns concept,lang
    """
    from gigabatch.launcher.cli.data_commands import index_source

    names = [name.strip() for name in columns.split(",")] if columns else []
    codes = [
        index_source(source, names, headers_only, dotted, partial, processes)
        for source in _as_folders(sources)
    ]
    return max(codes)


@data.command()
def check(
    source: Shards,
    every: Annotated[
        int, typer.Option(min=1, max=1 << 40, help="Read only every N-th sample.")
    ] = 1,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Also decode images, captions and audio.")
    ] = True,
    processes: Processes = None,
) -> int:
    """Read all members again and compare their checksums.

    Exit code 2 if a sample is damaged.
    """
    from gigabatch.launcher.cli.data_commands import check_source

    return check_source(source, every, decode, processes)


@data.command()
def stats(
    source: Shards,
    sample: Annotated[
        int, typer.Option(min=0, help="Number of samples to read, evenly spaced; 0: all.")
    ] = 100_000,
    caption: Annotated[
        str, typer.Option(metavar="MEMBER[:FIELD]", help="Where captions are, such as json:title.")
    ] = "txt",
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw a contact sheet into this file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Print statistics of a source.

    Counts, sizes, captions, duplicates, scripts and json fields.

    \b
    Examples:
      gigabatch data stats /data/pairs/train --sheet sheet.png
    """
    from gigabatch.launcher.cli.data_commands import describe_source

    describe_source(source, sample, caption, sheet, json)


@data.command()
def pack(
    source: TableOrShards,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new shards.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the files that the table names. Default: the table's folder.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    file_column: Annotated[
        str | None,
        typer.Option(
            help="Column of file names or contents; `none` for tables of text. Default: guessed."
        ),
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of captions. Repeatable; later ones go to json. Default: guessed."
        ),
    ] = None,
    key_column: Annotated[
        str | None, typer.Option(help="Column of sample keys. Default: row numbers.")
    ] = None,
    json_column: Annotated[
        list[str] | None,
        typer.Option(help="Column for the json member. Repeatable. Default: all other columns."),
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(help="Character between the fields of a CSV file. Default: found in it."),
    ] = None,
    merge_splits: Annotated[
        bool,
        typer.Option(
            "--merge-splits",
            help="Make one set of files of several splits, such as train-* and validation-*.",
        ),
    ] = False,
    per_shard: Annotated[int, typer.Option(min=1, help="Maximum samples per shard.")] = 10_000,
    shard_mib: Annotated[float, typer.Option(help="Maximum MiB per shard.")] = 512,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Seed to shuffle rows. Default: keep the table's order.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Prefix of shard names. Default: the name of OUT.")
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            help="Skip rows without a file or caption; list them in OUT/skipped.jsonl.",
        ),
    ] = False,
) -> None:
    """Write shards from a table, or from other shards.

    The same source gives the same bytes. An interrupted pack continues with its next shard.

    \b
    Examples:
      gigabatch data pack pairs.csv shards/train
      gigabatch data pack parquet-files/ shards/train --caption-column title --shuffle-seed 0
    """
    if not math.isfinite(shard_mib):
        raise GigabatchError(
            f"--shard-mib {shard_mib}: is not a size. Give a number of MiB, such as 512."
        )
    from gigabatch.launcher.cli.data_commands import pack_source

    settings = {
        "folder": folder, "file_column": file_column, "caption_column": caption_column or (),
        "key_column": key_column, "json_columns": json_column, "per_shard": per_shard,
        "shard_bytes": int(shard_mib * 2**20), "shuffle_seed": shuffle_seed, "prefix": prefix,
        "skip_missing": skip_missing, "merge_splits": merge_splits,
        "delimiter": "\t" if delimiter == "\\t" else delimiter,
    }  # fmt: skip
    pack_source(source, out, settings)


@data.command("filter")
def filter_(
    source: Shards,
    condition: Annotated[
        str,
        typer.Argument(
            metavar="EXPR",
            help="Condition over the index's columns (see `data index --columns`), such as "
            "'lang == \"en\" and score > 0.3' or 'size(\"jpg\") > 20000'.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Folder for the view. Default: only count samples."),
    ] = None,
) -> None:
    """Make a filtered view: samples that meet a condition.

    A view is used like a folder of shards, and no shard is copied.

    \b
    Examples:
      gigabatch data filter /data/pairs/train 'lang == "en"' /data/pairs/english
    """
    from gigabatch.launcher.cli.data_commands import filter_source

    filter_source(source, condition, out)


@data.command()
def batch(
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=1, help="Step; the first is 1.")] = 1,
    world: Annotated[int, typer.Option(min=1, max=1 << 20, help="Number of ranks.")] = 1,
    rank: Annotated[int | None, typer.Option(min=0, help="Print only this rank's samples.")] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Print rank, micro-batch, source, shard, sample number and key, tab-separated.",
        ),
    ] = False,
) -> None:
    """Print the sample keys of any step of a run.

    One line per sample, in the order of the batch.

    \b
    Examples:
      gigabatch data batch my.yaml --step 1000 --world 8 --rank 3 --long
    """
    from gigabatch.launcher.cli.data_commands import print_batch

    print_batch(config, overrides or [], step, world, rank, long)


def _as_folders(sources: list[str]) -> list[str]:
    """Replace all shards of a folder by the folder: a shell expands `shards/*.tar` to files."""
    files = [
        Path(source) for source in sources if source.endswith(".tar") and Path(source).is_file()
    ]
    if len(files) < 2:
        return sources
    folders = {file.parent for file in files}
    for folder in folders:
        if set(folder.glob("*.tar")) != {file for file in files if file.parent == folder}:
            raise GigabatchError(
                f"{files[0]} and other shards of {folder}: to index some shards of a folder as one "
                "source, put the pattern in quotes, as in data.train."
            )
    return [s for s in sources if Path(s) not in files] + sorted(map(str, folders))
