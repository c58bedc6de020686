"""Stage fetch: the model source becomes a checkpoint with its tokenizer and its facts."""

from pipeline.core import params, paths, stage
from pipeline.fetch import fetch

if __name__ == "__main__":
    # The whole experiment decides nothing of what is written: only whether a later stage would refuse the model.
    stage.run("fetch", lambda declared: fetch.fetch(declared[params.Model], params.load()), result=paths.BASE_FACTS)
