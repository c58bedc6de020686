"""What measurements share: the base, its quantized forms, and the data of two recipes, as the pipeline makes them."""

import argparse
from collections.abc import Callable

from claims import lab
from pipeline import data, fetch, params, paths, quantize, stage


def fetch_base() -> None:
    model = lab.experiment().model
    with lab.lab("fetch", {}, {paths.BASE: lab.BASE, paths.BASE_FACTS: lab.BASE_FACTS}):
        fetch.fetch(model)


def prepare(task: str) -> None:
    given = lab.experiment(task).data
    with lab.lab(f"prepare-{task}", {}, {paths.DATA: lab.data(task)}):
        data.prepare(given)


def quantize_base(method: str) -> None:
    """The default experiment's quantization, but for its method; the constants of 4-bit blocks are quantized too."""
    experiment = lab.experiment()
    double = method in ("nf4", "fp4")
    given = experiment.quantize.model_dump() | {"method": method, "double_quantization": double}
    links = {paths.BASE: lab.BASE, paths.BASE_FACTS: lab.BASE_FACTS, paths.DATA: lab.data("default")}
    facts = lab.quantized(method).with_suffix(".json")
    with lab.lab(f"quantize-{method}", links, {paths.QUANTIZED: lab.quantized(method), paths.QUANTIZED_FACTS: facts}):
        quantize.quantize(params.Quantize(**given), experiment.runtime)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fetch", "prepare", "quantize"])
    parser.add_argument("which", nargs="?", default="")
    arguments = parser.parse_args()
    calls: dict[str, Callable[[], None]] = {
        "fetch": fetch_base,
        "prepare": lambda: prepare(arguments.which),
        "quantize": lambda: quantize_base(arguments.which),
    }
    stage.process(f"claims-{arguments.what}-{arguments.which}", calls[arguments.what])
