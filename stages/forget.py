"""Stage forget: what one seed's adapter does to general text, against the base."""

import argparse

from pipeline import forget, params, paths, stage

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    seed = parser.parse_args().seed
    stage.run(
        "forget",
        lambda declared: forget.forget(seed, declared[params.Forget], declared[params.Runtime]),
        result=paths.forgetting(seed),
    )
