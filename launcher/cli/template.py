"""`gigabatch template`: job and cluster descriptions for other systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.output import write


def template(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="kuberay, slurm, ray-cluster or skypilot.")
    ],
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as for `train`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for `train`.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="A container image that holds gigabatch.")
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="0: one worker a node, on its CPUs.")
    ] = 8,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; otherwise it is printed.")
    ] = None,
) -> None:
    """Write what a cluster needs to train CONFIG: one worker a GPU, secrets by reference.

    Each file says at its top what to do with it and what it expects. A job that is started again
    goes on with its run. Which were tried on real clusters stands in docs/operations.md.

    \b
    gigabatch template slurm my.yaml cluster.workers=16 --out run.sbatch && sbatch run.sbatch
    gigabatch template kuberay my.yaml --image registry/gigabatch:1 | kubectl apply -f -
    """
    from gigabatch.launcher.templates import render

    text = render(kind, config, overrides or [], image, gpus_per_node)
    if out is None:
        write(text)
        return
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise GigabatchError(f"--out {out}: the file exists; it was left as it is.") from None
    except OSError as error:
        raise GigabatchError(f"--out {out}: cannot be written: {error.strerror}.") from error
