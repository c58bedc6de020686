"""Stage check: the parameters are sound; else DVC starts nothing."""

from pipeline import check, params, stage


def main(_: params.Declared) -> None:
    check.write()


if __name__ == "__main__":
    stage.run("check", main)
