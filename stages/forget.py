"""Stage forget: one seed's adapter is compared with the base on text that is not of the task."""

from pipeline import forget
from pipeline.core import params, paths, stage
from pipeline.model import processes


def main(declared: params.Declared, seed: int) -> None:
    forget.measure_seed(seed, declared[params.Forget], declared[params.Runtime])


if __name__ == "__main__":
    seed = stage.seed(__doc__)
    processes.run("forget", lambda declared: main(declared, seed), paths.forgetting(seed), seed)
