"""Stage fetch: the model source becomes a checkpoint with its tokenizer and its facts."""

from pipeline.core import params, paths, stage
from pipeline.fetch import fetch


def main(declared: params.Declared) -> None:
    # All parameters: a model that a later stage would refuse is refused here. They do not change what is written.
    fetch.write_base(declared[params.Model], params.load())


if __name__ == "__main__":
    stage.run("fetch", main, result=paths.BASE_FACTS)
