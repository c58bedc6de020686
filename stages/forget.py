"""Stage forget: what one seed's adapter does to general text, against the base."""

import argparse

from pipeline import distributed, forget, params, paths


def main(declared: params.Declared, seed: int) -> None:
    forget.forget(seed, declared[params.Forget], declared[params.Runtime])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    seed = parser.parse_args().seed
    distributed.run("forget", lambda declared: main(declared, seed), result=paths.forgetting(seed))
