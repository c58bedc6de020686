"""Stage fetch: the model source becomes a checkpoint with its tokenizer and its facts."""

from pipeline import fetch, params, paths, stage

if __name__ == "__main__":
    stage.run("fetch", lambda declared: fetch.fetch(declared[params.Model]), result=paths.BASE_FACTS)
