"""`gigabatch template`: job and cluster descriptions for other systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gigabatch.data.errors import GigabatchError
from gigabatch.launcher.cli.arguments import ConfigPath, Overrides
from gigabatch.launcher.output import write


class TemplateCommand(TyperCommand):
    """A command whose help ends with the registered templates."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each template with its requirements."""
        from gigabatch.launcher.templates.registry import all_templates

        rows = []
        for name, entry in all_templates().items():
            needs = ["--image"] * entry.needs_image + ["cluster.launcher=ray"] * entry.starts_ray
            rows.append((name, f"requires {' and '.join(needs)}" if needs else "--image optional"))
        with formatter.section("Kinds"):
            formatter.write_dl(rows)


def template(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Kind of file, listed below.")],
    config: ConfigPath,
    overrides: Overrides = None,
    image: Annotated[
        str | None,
        typer.Option(help="Container image with gigabatch; some kinds require it."),
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="GPUs per node; 0: one worker per node, on CPUs.")
    ] = 8,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write. Default: print.")
    ] = None,
) -> None:
    """Write a job file for another system, such as Slurm or KubeRay.

    The job trains CONFIG with one worker per GPU; secrets are only referenced. The top of each file
    says how to use it and what it requires. A restarted job continues its run. docs/operations.md
    says how each kind was tested.

    \b
    Examples:
      gigabatch template slurm my.yaml cluster.workers=16 --out run.sbatch && sbatch run.sbatch
      gigabatch template kuberay my.yaml --image registry/gigabatch:1 | kubectl apply -f -
    """
    from gigabatch.launcher.templates.render import render

    text = render(kind, config, overrides or [], image, gpus_per_node)
    if out is None:
        write(text)
        return
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise GigabatchError(f"--out {out}: the file exists; it was not changed.") from None
    except OSError as error:
        raise GigabatchError(f"--out {out}: cannot be written: {error.strerror}.") from error
