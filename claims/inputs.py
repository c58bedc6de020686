"""Stages fetch, prepare and quantize of the claims: the inputs that measurements share, made by the pipeline's code."""

import argparse

from claims import lab
from pipeline.core import params, paths, stage
from pipeline.fetch import fetch
from pipeline.prepare import prepare as data
from pipeline.quantize import quantize


def fetch_base() -> None:
    model = lab.experiment().model
    with lab.lab("fetch", {}, {paths.BASE: lab.BASE, paths.BASE_FACTS: lab.BASE_FACTS}):
        fetch.write_base(model)


def prepare(task: str) -> None:
    given = lab.experiment(task).data
    with lab.lab(f"prepare-{task}", {}, {paths.DATA: lab.data(task)}):
        data.write_splits(given)


def quantize_base(method: str) -> None:
    """Quantize the base as in the default experiment, but by `method`; NF4 with double quantization."""
    experiment = lab.experiment()
    given = experiment.quantize.model_dump() | {"method": method, "double_quantization": method == "nf4"}
    links = {paths.BASE: lab.BASE, paths.BASE_FACTS: lab.BASE_FACTS, paths.DATA: lab.data("default")}
    facts = lab.quantized(method).with_suffix(".json")
    with lab.lab(f"quantize-{method}", links, {paths.QUANTIZED: lab.quantized(method), paths.QUANTIZED_FACTS: facts}):
        quantize.write_quantized(params.Quantize(**given), experiment.runtime)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("fetch").set_defaults(call=fetch_base, which=[])
    one = what.add_parser("prepare")
    one.add_argument("which", nargs=1, metavar="task")
    one.set_defaults(call=prepare)
    one = what.add_parser("quantize")
    one.add_argument("which", nargs=1, metavar="method", choices=["none", "nf4"])
    one.set_defaults(call=quantize_base)
    arguments = parser.parse_args()
    name = "-".join(["claims", arguments.what, *arguments.which])
    stage.process(name, lambda: arguments.call(*arguments.which))
