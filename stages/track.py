"""Stage track: the report becomes a page, and the whole experiment one MLflow run."""

from pipeline.core import params, stage
from pipeline.core.progress import say
from pipeline.record import track
from pipeline.report import page


def main(declared: params.Declared) -> None:
    seen = track.looks_here(declared.seeds, declared[params.Tracking])
    page.write(declared.seeds, declared[params.Evaluate], declared[params.Compare].explorer, seen)
    track.record(declared.seeds, declared[params.Tracking])
    if seen is not None:
        say(seen.told())


if __name__ == "__main__":
    stage.run("track", main)
