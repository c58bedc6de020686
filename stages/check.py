"""Stage check: the parameters are sound. Otherwise no other stage starts."""

from pipeline.core import params, paths, records, stage


def main(_: params.Declared) -> None:
    """Write the file on which the first stages depend. Its content is always the same, so nothing reruns."""
    records.write_json(paths.CHECKED, {"params.yaml": "checked"})


if __name__ == "__main__":
    stage.run("check", main)
