"""Stage check: the parameters are sound. Otherwise no other stage starts."""

from pipeline.core import params, stage
from pipeline.record import check


def main(_: params.Declared) -> None:
    check.write()


if __name__ == "__main__":
    stage.run("check", main)
