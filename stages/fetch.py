"""Stage fetch: the model source becomes a checkpoint with its tokenizer and its facts."""

from pipeline.core import params, paths, stage
from pipeline.fetch import fetch

if __name__ == "__main__":
    # All parameters: a model that a later stage would refuse is refused here. They do not change what is written.
    stage.run("fetch", lambda declared: fetch.fetch(declared[params.Model], params.load()), result=paths.BASE_FACTS)
