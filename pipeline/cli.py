"""The command `lora-repro`: what DVC has no word for. It never stands in for `dvc`."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.errors import UserError


class Commands(TyperGroup):
    """Prints a user's mistake as one message, without a traceback, and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        try:
            print(f"lora-repro {version('lora-repro')}")
        except PackageNotFoundError:
            print("lora-repro, run from its source without being installed")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)]


@app.callback()
def main(_version_asked: Version = False) -> None:
    """Did (Q)LoRA fine-tuning make this model better at my task, by how much, and can I get the same numbers again?

    Run the experiment of params.yaml with: dvc repro
    """


@app.command()
def show() -> None:
    """The verdict of the last comparison, where to look next, and the MLflow run that holds its record."""
    # Imported here: `--help` needs none of it.
    from pipeline import params, report, track

    given = params.load()
    print(report.closing_lines(track.tracking_uri(given.tracking)))
    print(f"  run      {track.describe(given.seeds, given.tracking)}")


@app.command()
def store() -> None:
    """The address of the MLflow store that experiments of this project are recorded in."""
    from pipeline import params, track

    print(track.tracking_uri(params.load().tracking))
