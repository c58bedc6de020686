"""Stage track: the report becomes a page, and the whole experiment one MLflow run."""

from pipeline.core import params, stage
from pipeline.record import track
from pipeline.report import page


def main(declared: params.Declared) -> None:
    page.write(declared.seeds, declared[params.Evaluate], declared[params.Compare].explorer)
    track.record(declared.seeds, declared[params.Tracking])


if __name__ == "__main__":
    stage.run("track", main)
