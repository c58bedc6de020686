"""Stage infer-tuned@<seed>: the base with one seed's adapter answers the same prompts."""

from pipeline.core import params, paths, stage
from pipeline.infer import infer
from pipeline.lora import adapter
from pipeline.model import processes


def main(declared: params.Declared, seed: int) -> None:
    prompt, generation, runtime = declared[params.Prompt], declared[params.Generation], declared[params.Runtime]
    saved = adapter.Saved(paths.adapter(seed))
    infer.decode(paths.variant(seed), prompt, generation, runtime, saved, declared.split)


if __name__ == "__main__":
    seed = stage.seed(__doc__)
    result = paths.predictions(paths.variant(seed))
    processes.run("infer-tuned", lambda declared: main(declared, seed), result, seed)
