"""The command `lora-repro`: what `dvc` has no command for. It replaces no command of `dvc`."""

import os
import sys
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.core.errors import UserError
from pipeline.core.progress import print_in_any_locale, say


class Commands(TyperGroup):
    """Prints a UserError as one message without a traceback, and exits with 1."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        print_in_any_locale()  # before --help as well
        return super().main(*arguments, **options)

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


RUN = Annotated[str | None, typer.Argument(help="An MLflow run: its id, the beginning of its id, or its name.")]


@app.command()
def show(run: RUN = None) -> None:
    """Show the verdict of the last comparison, where to look next, and its MLflow run.

    With RUN: its verdict, whether its adapter is the one in its dvc.lock, and the commands that restore it.
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
    say(wording.closing_lines(store.shown(given.tracking), page.describe(given.seeds)))
    say(f"  run      {track.describe(given.seeds, given.tracking)}")
    if (seen := track.looks_here(given.seeds, given.tracking)) is not None:
        say(f"  looks    {seen.told()}")


Recompute = Annotated[bool, typer.Option("--recompute", help="Compute everything again in a copy, and compare.")]


@app.command()
def verify(recompute: Recompute = False) -> None:
    """Check that cache, dvc.lock, outputs, reports, MLflow run and downloaded wheels agree, by content."""
    # Imported here: `--help` needs none of it.
    if recompute:
        from pipeline.commands.recompute import run_again

        agreed = run_again()
    else:
        from pipeline.commands import verify

        agreed = verify.check_all()
    if not agreed:
        raise typer.Exit(1)


Names = Annotated[list[str], typer.Argument(help="workspace, DVC experiments, git revisions, MLflow runs.")]


@app.command()
def compare(names: Names) -> None:
    """Rank experiments, with intervals, and compare every two of them on the same test examples.

    The scores come from the DVC cache or the MLflow store. p-values are corrected for the number of comparisons.
    """
    from pipeline.commands import compare
    from pipeline.core import params
    from pipeline.record import looks

    given = params.load()
    if len(names) < 2:
        raise UserError(f"compare needs at least two experiments, such as: lora-repro compare workspace {names[0]}")
    found = [compare.find(name, given.tracking) for name in names]
    ranking = compare.rank(found, given.compare, looks.total(found[0].base.test_sha256, given.tracking))
    say(compare.page(found, ranking, given.compare))


SHEET = Annotated[Path, typer.Argument(help="The sheet, a CSV file.")]
Filled = Annotated[bool, typer.Option("--read", help="Read the filled sheet, and say who was preferred.")]
Few = Annotated[int, typer.Option("--rows", min=1, help="Rows of the sheet.")]
Order = Annotated[int, typer.Option("--seed", min=0, help="Decides which of A and B is the tuned model's output.")]


@app.command()
def blind(sheet: SHEET, filled: Filled = False, rows: Few = 50, seed: Order = 17) -> None:
    """Write a sheet on which people judge outputs of base and tuned without knowing which is which; or read it."""
    from pipeline.commands import blind
    from pipeline.core import params

    if filled:
        blind.read(sheet, seed, params.load())
    else:
        blind.write(sheet, rows, seed, params.load())


GgufTypes = Annotated[list[str] | None, typer.Option("--type", help="A GGUF type. [default: generation.gguf_type]")]
FewRows = Annotated[
    int | None, typer.Option("--rows", min=2, help="Rows of each split, in whole groups. [default: all]")
]
OneFile = Annotated[bool, typer.Option("--merged", help="Merge the adapter into the GGUF file.")]
MaxRise = Annotated[float, typer.Option("--max-rise", min=0, help="A larger rise in perplexity (a share) is a loss.")]


@app.command()
def parity(types: GgufTypes = None, rows: FewRows = None, merged: OneFile = False, max_rise: MaxRise = 0.01) -> None:
    """Compare base and adapter in transformers with the same as GGUF files in llama.cpp.

    Writes reports/parity.md and reports/parity.json. The exit code is 1 if a GGUF file loses quality.
    """
    from pipeline.core import params
    from pipeline.export import parity
    from pipeline.record import current

    given = params.load()
    current.require_current("nothing is compared:")
    if parity.measure(given, types or [given.generation.gguf_type], rows, merged, max_rise):
        raise typer.Exit(1)


@app.command()
def unseal(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and run nothing.")] = False,
) -> None:
    """Score this folder's experiment, which was scored on the validation split, on the test split: once.

    It runs as a DVC experiment beside this folder, which stays as it is. Its record tells that the test split was
    opened, and whether the rule of the decision was recorded before.
    """
    from pipeline.commands import unseal
    from pipeline.core import params

    unseal.score(params.load(), dry_run)


Model = Annotated[str | None, typer.Option("--model", help="Registered model. [default: tracking.experiment]")]
Preview = Annotated[bool, typer.Option("--dry-run", help="Compare, say what would happen, and write nothing.")]


@app.command()
def promote(run: RUN = None, model: Model = None, dry_run: Preview = False) -> None:
    """Register the adapter of RUN (default: of this folder) in MLflow; the champion moves only on a significant gain.

    The exit code is 0 whether the champion moves or stays, and 1 if the two cannot be compared.
    """
    from pipeline.commands import promote
    from pipeline.core import params

    promote.register_and_decide(run, model, params.load(), dry_run)


View = Annotated[bool, typer.Option("--view", help="Print where MLflow's pages show the scores.")]


@app.command()
def store(view: View = False) -> None:
    """Print the address of the MLflow store in which experiments are recorded, with its password if it has one."""
    from pipeline.core import params
    from pipeline.record import address, store

    tracking = params.load().tracking
    text = store.view(tracking) if view else address.tracking_uri(tracking)
    # Its very bytes, whatever the locale: a shell takes it, and MLflow would make a store where another path says.
    try:
        typer.echo(os.fsencode(text))
    except UnicodeEncodeError:  # params.yaml names a server with characters that this locale lacks
        typer.echo(text.encode("utf-8", "surrogateescape"))


@app.command()
def viewer() -> None:
    """Let the pages of `dvc plots show` and `dvc plots diff` open without a network, on this machine."""
    from pipeline.commands import viewer

    viewer.prepare()


@app.command()
def mend() -> None:
    """Remove files that a killed DVC left half-written, so that `dvc repro` starts again."""
    from pipeline.commands import mend

    mend.remove_half_written()


@app.command()
def check() -> None:
    """Check params.yaml against itself, the data, the model and this machine; print every mistake. Nothing is run."""
    from pipeline.check import check

    check.require_sound()


RECIPE = Annotated[str | None, typer.Argument(help="The name of a recipe in recipes/, or the path of its file.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite changes that neither a recipe nor git has.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")]


@app.command()
def use(recipe: RECIPE = None, force: Force = False, dry_run: DryRun = False) -> None:
    """Write params.yaml from a recipe; only runtime and tracking stay as they are.

    Without RECIPE: list the recipes, what each needs, and which one params.yaml has now.
    """
    from pipeline.commands import use

    if recipe is None:
        use.show()
    else:
        use.apply(recipe, force, dry_run)


@app.command()
def plan(recipe: RECIPE = None) -> None:
    """Predict the memory of each stage of params.yaml or RECIPE, and the largest settings that fit.

    For GPUs of 24, 48 and 80 GB and for this machine's main memory. Nothing is loaded.
    """
    from pipeline.commands import plan

    plan.show(recipe)


FILE = Annotated[Path | None, typer.Argument(help="The file of a search, such as sweeps/example.yaml.")]
Set = Annotated[list[str] | None, typer.Option("-S", "--set-param", help="<parameter>=<value>,<value>...")]
Jobs = Annotated[int | None, typer.Option("-j", "--jobs", min=1, help="Experiments at once here. [default: 1]")]
Ray = Annotated[str | None, typer.Option("--ray", help="Run trials on a Ray cluster: auto, local or its address.")]


@app.command()
def sweep(file: FILE = None, overrides: Set = None, jobs: Jobs = None, ray: Ray = None) -> None:
    """Run every combination of -S, each tested; or the search in FILE; or the comparison of methods in FILE.

    Trials of a search are only trained and validated; the winner alone is tested, once. In a comparison each arm is
    tested once, at its best learning rate by validation. What was killed goes on when it is run again. The exit code is
    0 if all succeeded.
    """
    if (file is None) == (not overrides):
        raise UserError("sweep needs either -S <parameter>=<value>,<value>... or the file of a search")
    if file is None:
        if ray is not None:
            raise UserError("--ray runs the trials of a search: give its file instead of -S")
        from pipeline.search import grid

        raise typer.Exit(grid.sweep(overrides or [], jobs or 1))
    from pipeline.search import arms

    if arms.is_comparison(file):
        from pipeline.commands import methods

        if ray is not None:
            raise UserError("--ray runs the trials of a search; a comparison of methods runs on this machine")
        methods.run(file, jobs or 1)
        return
    if ray is not None and jobs is not None:
        raise UserError("-j is for this machine: set at_once and cluster in the file to say how many run on a cluster")
    from pipeline.search import run

    raise typer.Exit(run.search(file, jobs, ray))


class Export(StrEnum):
    """What `export` writes."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


WHAT = Annotated[Export, typer.Argument(help="The adapter, the model with it merged in, or GGUF files.")]
DEST = Annotated[Path, typer.Argument(help="The folder to write, which must be new or empty.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The seed. [default: that of the lowest validation loss]")]
Kind = Annotated[str | None, typer.Option("--type", help="gguf: the type, such as F16 or Q4_0. [default: Q8_0]")]
Joined = Annotated[bool, typer.Option("--merged", help="gguf: one file with the adapter merged in.")]
Base = Annotated[
    bool | None, typer.Option("--base/--no-base", help="adapter: its base, too. [default: unless the hub has it]")
]
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
    """Write this folder's result as files for transformers, PEFT or llama.cpp, with a model card.

    The numbers in the card are those of the run. How far the files differ from the model that was scored is measured.
    """
    from pipeline.export import export

    export.write(export.Asked(what.value, seed, kind, merged, base), dest, overwrite)
