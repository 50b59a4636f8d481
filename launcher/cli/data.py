"""`gigabatch data ...`: shards made, indexed, checked, described, filtered; a run's batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError

data = typer.Typer(
    help="Make, index, check and look at sets of shards.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SOURCE_HELP = (
    "A folder of .tar shards, a pattern in quotes ('shards/cc-{0000..0123}.tar', "
    "'s3://bucket/*.tar'; also gs://, hf://, https://), or a view made by `filter`."
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes at work; default: one a core.")
]


@data.command()
def index(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=SOURCE_HELP)],
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Fields of the json member to bring into the index, such as concept,lang. "
            "Those that it has already stay.",
        ),
    ] = None,
    headers_only: Annotated[
        bool,
        typer.Option("--headers-only", help="Read no data: faster, but without checksums."),
    ] = False,
    dotted: Annotated[
        bool,
        typer.Option("--dotted", help="Extensions with dots (left.jpg) are meant as they are."),
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Samples may lack a member that others have.")
    ] = False,
    processes: Processes = None,
) -> int:
    """Index sets of shards: find every sample, sum every member, refuse whatever is damaged.

    Done once; shards that are added later are indexed alone. Training indexes by itself what is
    not indexed yet.
    """
    from gigabatch.launcher.cli.data_commands import index_source

    wanted = [name.strip() for name in columns.split(",")] if columns else []
    codes = [
        index_source(source, wanted, headers_only, dotted, partial, processes)
        for source in _whole_sets(sources)
    ]
    return max(codes)


@data.command()
def check(
    source: Source,
    every: Annotated[int, typer.Option(min=1, max=1 << 40, help="Read one sample in so many.")] = 1,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode images, captions and audio.")
    ] = True,
    processes: Processes = None,
) -> int:
    """Read every member again, compare its checksum, decode it. Exit code 2 if any is bad."""
    from gigabatch.launcher.cli.data_commands import check_source

    return check_source(source, every, decode, processes)


@data.command()
def stats(
    source: Source,
    sample: Annotated[
        int, typer.Option(min=0, help="Samples opened, evenly spaced; 0: all of them.")
    ] = 100_000,
    caption: Annotated[
        str, typer.Option(metavar="MEMBER[:FIELD]", help="Where captions are, such as json:title.")
    ] = "txt",
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw a contact sheet into this file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a set: counts, sizes, captions, duplicates, scripts, fields; a contact sheet."""
    from gigabatch.launcher.cli.data_commands import describe_source

    describe_source(source, sample, caption, sheet, json)


@data.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A table (CSV, TSV, JSONL, Parquet, Arrow) that names files or holds their bytes, "
            "or a set of shards to be cut anew.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder of shards.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where the files lie; default: beside the table.")
    ] = None,
    file_column: Annotated[
        str | None,
        typer.Option(
            help="The column of files, or of their bytes; `none` for texts alone. Default: guessed."
        ),
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(help="The column of captions; further ones go to json. Default: guessed."),
    ] = None,
    key_column: Annotated[
        str | None, typer.Option(help="The column of keys; default: the rows' numbers.")
    ] = None,
    json_column: Annotated[
        list[str] | None, typer.Option(help="A column for json; default: all that are left.")
    ] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard, at most.")] = 10_000,
    shard_mib: Annotated[float, typer.Option(help="MiB of a shard, at most.")] = 512,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Mix the rows; default: as they come.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Begins the shards' names; default: OUT's name.")
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            help="Leave out rows without a file or caption, and list them in skipped.jsonl.",
        ),
    ] = False,
) -> None:
    """Write shards. The same source gives the same bytes; cut off, it goes on where it was."""
    from gigabatch.launcher.cli.data_commands import pack_source

    if not math.isfinite(shard_mib):
        raise GigabatchError(f"--shard-mib {shard_mib}: is no size. Say how many MiB, such as 512.")
    settings = {
        "folder": folder, "file_column": file_column, "caption_column": caption_column or (),
        "key_column": key_column, "json_columns": json_column, "per_shard": per_shard,
        "shard_bytes": int(shard_mib * 2**20), "shuffle_seed": shuffle_seed, "prefix": prefix,
        "skip_missing": skip_missing,
    }  # fmt: skip
    pack_source(source, out, settings)


@data.command("filter")
def filter_(
    source: Source,
    condition: Annotated[
        str,
        typer.Argument(
            metavar="EXPR",
            help="Such as 'lang == \"en\" and score > 0.3' or 'size(\"jpg\") > 20000', over the "
            "index's columns (see `index --columns`).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="The view's folder; without one, only counted."),
    ] = None,
) -> None:
    """Make a view: the samples that meet a condition, as a set of its own, without copying any."""
    from gigabatch.launcher.cli.data_commands import filter_source

    filter_source(source, condition, out)


@data.command()
def batch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Set keys.")
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="The step, from 1.")] = 1,
    world: Annotated[int, typer.Option(min=1, max=1 << 20, help="Number of ranks.")] = 1,
    rank: Annotated[int | None, typer.Option(min=0, help="This rank's part alone.")] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long", help="Rank, micro-batch, source, shard, sample number and key, by tabs."
        ),
    ] = False,
) -> None:
    """Print the keys of the samples of any step, a line each, in the order of the batch."""
    from gigabatch.launcher.cli.data_commands import print_batch

    print_batch(config, overrides or [], step, world, rank, long)


def _whole_sets(sources: list[str]) -> list[str]:
    """A shell turns `shards/*.tar` into files: those of one folder are that folder."""
    files = [
        Path(source) for source in sources if source.endswith(".tar") and Path(source).is_file()
    ]
    if len(files) < 2:
        return sources
    folders = {file.parent for file in files}
    for folder in folders:
        if set(folder.glob("*.tar")) != {file for file in files if file.parent == folder}:
            raise GigabatchError(
                f"{files[0]} and others of {folder}: to index some shards of a folder as one set, "
                "put the pattern in quotes, as you will write it in data.train."
            )
    return [s for s in sources if Path(s) not in files] + sorted(map(str, folders))
