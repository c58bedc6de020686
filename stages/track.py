"""Stage track: the whole experiment as one MLflow run."""

from pipeline import params, stage, track


def main(declared: params.Declared) -> None:
    track.track(declared.seeds, declared[params.Tracking])


if __name__ == "__main__":
    stage.run("track", main)
