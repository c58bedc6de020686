"""The command `lora-repro`: what DVC has no word for. It never stands in for `dvc`."""

import sys
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.core.errors import UserError
from pipeline.core.progress import say


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


RUN = Annotated[str | None, typer.Argument(help="An MLflow run: its id, the beginning of it, or its name.")]


@app.command()
def show(run: RUN = None) -> None:
    """The verdict of the last comparison, where to look next, and the MLflow run that holds its record.

    With RUN: that run's verdict, the commands that restore it, and whether its adapter is the one it was locked with.
    """
    # Imported here: `--help` needs none of it.
    from pipeline.core import params
    from pipeline.record import store, track
    from pipeline.report import page, wording

    given = params.load()
    if run is not None:
        from pipeline.commands import show

        show.print_run(run, given.tracking)
        return
    say(wording.closing_lines(store.address(given.tracking), page.describe(given.seeds)))
    say(f"  run      {track.describe(given.seeds, given.tracking)}")


Recompute = Annotated[bool, typer.Option("--recompute", help="Compute everything anew in a copy, and compare.")]


@app.command()
def verify(recompute: Recompute = False) -> None:
    """Check by content that cache, dvc.lock, outputs, reports, MLflow run and downloaded wheels agree."""
    # Imported here: `--help` needs none of it.
    if recompute:
        from pipeline.commands.recompute import run_again

        agreed = run_again()
    else:
        from pipeline.commands import verify

        agreed = verify.check_all()
    if not agreed:
        raise typer.Exit(1)


Names = Annotated[list[str], typer.Argument(help="workspace, DVC experiments, git revisions or MLflow runs.")]


@app.command()
def compare(names: Names) -> None:
    """Rank experiments, with intervals, and compare each two of them on the same test examples.

    Their scores come from the DVC cache or the MLflow store. Significance is corrected for the number of comparisons.
    """
    from pipeline.commands import compare
    from pipeline.core import params

    given = params.load()
    if len(names) < 2:
        raise UserError(f"compare needs two experiments at least, such as: lora-repro compare workspace {names[0]}")
    found = [compare.find(name, given.tracking) for name in names]
    say(compare.page(found, compare.rank(found, given.compare), given.compare))


GgufTypes = Annotated[
    list[str], typer.Option("--type", help="A GGUF type; again for more. [default: generation.gguf_type]")
]
FewRows = Annotated[
    int | None, typer.Option("--rows", min=2, help="Rows of each split, whole groups; all if not given.")
]
OneFile = Annotated[bool, typer.Option("--merged", help="The adapter merged into the file, not beside it.")]
MaxRise = Annotated[float, typer.Option("--max-rise", min=0, help="A rise in perplexity by this share is a loss.")]


@app.command()
def parity(types: GgufTypes = [], rows: FewRows = None, merged: OneFile = False, max_rise: MaxRise = 0.01) -> None:  # noqa: B006
    """Does the experiment survive as GGUF? Base and adapter through transformers and llama.cpp, compared.

    Writes reports/parity.md and reports/parity.json. The exit code is 1 where a GGUF file loses quality.
    """
    from pipeline.core import params
    from pipeline.export import parity
    from pipeline.record import current

    given = params.load()
    current.require_current("nothing is compared:")
    if parity.measure(given, types or [given.generation.gguf_type], rows, merged, max_rise):
        raise typer.Exit(1)


Model = Annotated[str | None, typer.Option("--model", help="Registered model. [default: tracking.experiment]")]
Preview = Annotated[bool, typer.Option("--dry-run", help="Compare and say what would happen, and write nothing.")]


@app.command()
def promote(run: RUN = None, model: Model = None, dry_run: Preview = False) -> None:
    """Register the adapter of a run (else of this folder's) in MLflow; the champion moves on a significant gain only.

    The exit code is 0 whether the champion moves or stays, and 1 where they cannot be compared.
    """
    from pipeline.commands import promote
    from pipeline.core import params

    promote.register_and_decide(run, model, params.load(), dry_run)


View = Annotated[bool, typer.Option("--view", help="Where MLflow's page shows them with their scores, instead.")]


@app.command()
def store(view: View = False) -> None:
    """The whole address of the MLflow store that experiments are recorded in, with its password where it has one."""
    from pipeline.core import params
    from pipeline.record import store

    tracking = params.load().tracking
    print(store.view(tracking) if view else store.tracking_uri(tracking))


@app.command()
def viewer() -> None:
    """Make the pages of `dvc plots show` and `dvc plots diff` open without a network, on this machine."""
    from pipeline.commands import viewer

    viewer.prepare()


@app.command()
def mend() -> None:
    """Remove what a killed DVC left half-written, so that `dvc repro` starts again."""
    from pipeline.commands import mend

    mend.remove_half_written()


@app.command()
def check() -> None:
    """Read params.yaml and dvc.lock as a stranger's, and print every mistake; nothing is run."""
    from pipeline.record import check

    check.require_sound()


RECIPE = Annotated[str | None, typer.Argument(help="A name of recipes/, or the path of a recipe's file.")]
Force = Annotated[bool, typer.Option("--force", help="Give up changes that neither a recipe nor git has.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")]


@app.command()
def use(recipe: RECIPE = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Write params.yaml by a recipe, whatever it held before; runtime and tracking stay as they are.

    Without RECIPE: list the recipes, what each needs, and which one params.yaml holds now.
    """
    from pipeline.commands import use

    if recipe is None:
        use.show()
    else:
        use.apply(recipe, force, dry_run)


@app.command()
def plan(recipe: RECIPE = None) -> None:
    """The memory that each stage of params.yaml, or of RECIPE, is predicted to take, and the largest settings that fit.

    For GPUs of 24, 48 and 80 GB and this machine's main memory. Nothing is loaded.
    """
    from pipeline.commands import plan

    plan.show(recipe)


FILE = Annotated[Path | None, typer.Argument(help="A search's file, such as sweeps/example.yaml.")]
Set = Annotated[list[str], typer.Option("-S", "--set-param", help="<parameter>=<value>,<value>...")]
Jobs = Annotated[int | None, typer.Option("-j", "--jobs", min=1, help="Experiments at once here; 1 if not given.")]
Ray = Annotated[str | None, typer.Option("--ray", help="Trials of FILE on a Ray cluster: auto, local or its address.")]


@app.command()
def sweep(file: FILE = None, overrides: Set = [], jobs: Jobs = None, ray: Ray = None) -> None:  # noqa: B006
    """-S: every combination as a whole experiment, tested, to compare. FILE: a search that selects on validation loss.

    The trials of a search are trained and validated only; its winner alone is tested, once. Run again after a kill, it
    goes on. The exit code tells whether all succeeded.
    """
    if (file is None) == (not overrides):
        raise UserError("sweep needs either -S <parameter>=<value>,<value>... or the file of a search")
    if file is None:
        if ray is not None:
            raise UserError("--ray runs the trials of a search: give its file instead of -S")
        from pipeline.search import grid

        raise typer.Exit(grid.sweep(overrides, jobs or 1))
    if ray is not None and jobs is not None:
        raise UserError("-j is for this machine; on a cluster at_once and cluster in the file say how many run at once")
    from pipeline.search import run

    raise typer.Exit(run.search(file, jobs, ray))


class Export(StrEnum):
    """What `export` writes."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


WHAT = Annotated[Export, typer.Argument(help="The adapter, weights with it merged in, or GGUF files for llama.cpp.")]
DEST = Annotated[Path, typer.Argument(help="The folder to write; it must not be there yet.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of several, which; else that of the lowest validation loss.")]
Kind = Annotated[str | None, typer.Option("--type", help="gguf: how weights are stored, such as F16 or Q4_0. [Q8_0]")]
Joined = Annotated[bool, typer.Option("--merged", help="gguf: one file with the adapter merged in, instead of two.")]
Base = Annotated[bool | None, typer.Option("--base/--no-base", help="adapter: its base as well. [unless on the hub]")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in DEST.")]


@app.command()
def export(
    what: WHAT,
    dest: DEST,
    seed: Seed = None,
    kind: Kind = None,
    merged: Joined = False,
    base: Base = None,
    overwrite: Overwrite = False,
) -> None:
    """Write this folder's result as files that transformers, PEFT or llama.cpp load, with a model card.

    The card's numbers come from the run; what separates the files from the model that was measured is measured, too.
    """
    from pipeline.export import export

    export.write(export.Asked(what.value, seed, kind, merged, base), dest, overwrite)
