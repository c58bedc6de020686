"""Speed and memory of this project beside other engines, on this machine: `make bench`, after `make repro`.

    python -m bench.speed [--repeats 3]

The engines of a comparison take turns, each in its own process. Figures are medians over the rounds, and so are ratios.
A comparison is refused if losses differ by more than `LOSS_TOLERANCE`, or if a text differs in float32.
Writes reports/bench.md and reports/bench.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import Any

from bench.engines import PROMPTS
from pipeline.core import paths, records

LOSS_TOLERANCE = 0.01
"""Relative difference of the mean loss over all steps."""

GENERATE_SIZES = (8, 16, 32)

Result = dict[str, Any]

SCALING = {
    "Tokens a row, one row a step": ("train-scaling", {n: f"{n}x1x16" for n in (128, 256, 512, 1024, 2048)}),
    "Rows a step, of 256 tokens": ("train-scaling", {n: f"256x{n}x16" for n in (1, 4, 16)}),
    "Rank, one row of 512 tokens": ("train-scaling", {n: f"512x1x{n}" for n in (1, 4, 16, 64, 256)}),
    "Examples to write": ("infer-ours", {n: str(n) for n in (12, 48, 96, 300)}),
}
"""The quantities that time and memory are measured against: an engine, and its setting for each value."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    rate = run("rate")["gflops"]
    training = rounds(repeats, [("train-ours", "rows"), ("train-trl", ""), ("train-ours", "groups")])
    ours, trl, groups = training
    difference = abs(mean_loss(ours) / mean_loss(trl) - 1)
    if difference > LOSS_TOLERANCE:
        print(f"error: the mean losses differ by {difference:.2%}: not the same training", file=sys.stderr)
        return 1
    exact = [run(engine, "float32")["outputs"] for engine in ("infer-transformers", "infer-ours")]
    same = sum(exact[0][name] == exact[1][name] for name in exact[0])
    if same < len(exact[0]) or exact[0].keys() != exact[1].keys():
        print(f"error: in float32 only {same} of {len(exact[0])} texts are the same", file=sys.stderr)
        return 1
    best = min(GENERATE_SIZES, key=lambda size: run("infer-transformers", str(size))["seconds"])
    engines = [("infer-ours", str(PROMPTS)), ("infer-transformers", str(best)), ("infer-transformers", "1")]
    inference = rounds(repeats, [*engines, ("infer-llamacpp", "16")])
    document = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": os.cpu_count() or 1,
            "bf16_gflops": rate,
        },
        "repeats": repeats,
        "loss_difference": difference,
        "float32_texts": {"same": same, "of": len(exact[0])},
        "best_generate_batch": best,
        "training": {name: measures(results, rate) for name, results in zip(NAMES[:3], training, strict=True)},
        "inference": {name: measures(results, rate) for name, results in zip(NAMES[3:], inference, strict=True)},
        "ratios": {
            "training tokens/s, rows by themselves, to TRL": ratio(ours, trl, "tokens"),
            "training rows/s, groups shared, to TRL": ratio(groups, trl, "rows"),
            "peak training memory, rows by themselves, to TRL": statistics.median(
                mine["peak_mb"] / other["peak_mb"] for mine, other in zip(ours, trl, strict=True)
            ),
            "examples/s to generate at its best batch": ratio(inference[0], inference[1], "examples"),
            "examples/s to generate one by one": ratio(inference[0], inference[2], "examples"),
            "examples/s to llama.cpp": ratio(inference[0], inference[3], "examples"),
        },
        "bfloat16_texts_as_generate": agreement(inference[0], inference[1]),
        "scaling": {title: scaling(engine, settings) for title, (engine, settings) in SCALING.items()},
        "adapters": run("adapters"),
    }
    records.write_json(paths.REPORTS / "bench.json", document)
    records.write_text(paths.REPORTS / "bench.md", page(document))
    print(page(document))
    return 0


NAMES = (
    "ours, rows by themselves",
    "TRL SFTTrainer",
    "ours, groups shared",
    "ours",
    "transformers.generate, its best batch",
    "transformers.generate, one by one",
    "llama.cpp, 16 slots, prebuilt wheel, Q4_1",
)


def run(engine: str, setting: str = "") -> Result:
    """One measurement in its own process; SystemExit with its output if it fails."""
    print(f"measuring {engine} {setting}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bench.engines", engine, *([setting] if setting else [])]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if done.returncode or not lines:
        sys.exit(f"error: {engine} {setting} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: Result = json.loads(lines[-1].removeprefix("result "))
    return result


def rounds(repeats: int, engines: list[tuple[str, str]]) -> list[list[Result]]:
    """The results of each engine, one for each round. In a round all engines run in turn."""
    taken = [[run(*engine) for engine in engines] for _ in range(repeats)]
    return [list(results) for results in zip(*taken, strict=True)]


def ratio(ours: list[Result], theirs: list[Result], unit: str) -> float:
    """Our speed over theirs, in `unit` per second: the median over the rounds."""
    return float(
        statistics.median(
            (mine[unit] / mine["seconds"]) / (other[unit] / other["seconds"])
            for mine, other in zip(ours, theirs, strict=True)
        )
    )


def scaling(engine: str, settings: dict[int, str]) -> list[Result]:
    """One measurement for each value."""
    found = []
    for value, setting in settings.items():
        result = run(engine, setting)
        found.append({"value": value} | {key: result[key] for key in ("seconds", "tokens", "peak_mb")})
    return found


def mean_loss(results: list[Result]) -> float:
    return float(statistics.fmean(results[0]["losses"]))


def measures(results: list[Result], rate: float) -> dict[str, float]:
    """Medians over the rounds. `share_of_rate`: of the rate of the machine's matrix product (see `arithmetic`)."""
    unit = "rows" if "rows" in results[0] else "examples"
    found = {
        f"{unit}_per_second": statistics.median(result[unit] / result["seconds"] for result in results),
        "tokens_per_second": statistics.median(result["tokens"] / result["seconds"] for result in results),
        "peak_mb": statistics.median(result["peak_mb"] for result in results),
    }
    if unit == "rows":
        found["share_of_rate"] = statistics.median(
            arithmetic(result) / 1e9 / result["seconds"] / rate for result in results
        )
    return found


def arithmetic(result: Result) -> float:
    """Floating-point operations that the training steps need.

    4 for each frozen parameter of a linear layer and token (2 forward, 2 back to its input), 6 for each of the adapter
    (2 more for its own gradient), 4 for each of the head and supervised token. Attention is not counted.
    """
    tokens = result["tokens"] * (4 * result["linear"] + 6 * result["adapter"])
    return float(tokens + 4 * result["supervised"] * result["head"])


def agreement(ours: list[Result], theirs: list[Result]) -> dict[str, int]:
    mine, other = ours[0]["outputs"], theirs[0]["outputs"]
    return {"same": sum(mine[name] == other[name] for name in mine), "of": len(mine)}


def page(document: Result) -> str:
    """reports/bench.md, from the content of reports/bench.json."""
    machine = document["machine"]
    return "\n".join(
        [
            "# Speed beside others",
            "",
            f"One machine ({machine['threads']} CPU threads; bf16 matrix product {machine['bf16_gflops']:.0f} "
            "GFLOP/s), "
            f"medians of {document['repeats']} rounds in which the engines took turns. `make bench` writes this page.",
            "",
            *_training(document),
            *_inference(document),
            *_ratios(document),
            *_scaling(document),
            *_adapters(document),
        ]
    )


def _training(document: Result) -> list[str]:
    return [
        "## Training",
        "",
        "NF4 base, rank 16 on all linear layers, the same rows in the same order from the same adapter. Tokens are "
        "those computed, without padding. Share: arithmetic needed, without attention, of the matrix product's rate.",
        "",
        "| | rows/s | tokens/s | peak memory | share |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {row['rows_per_second']:.2f} | {row['tokens_per_second']:.0f} "
            f"| {row['peak_mb'] / 1024:.1f} GB | {row['share_of_rate']:.0%} |"
            for name, row in document["training"].items()
        ),
        "",
        f"The mean losses of ours (rows by themselves) and TRL differ by {document['loss_difference']:.2%}.",
        "",
    ]


def _inference(document: Result) -> list[str]:
    exact, rough = document["float32_texts"], document["bfloat16_texts_as_generate"]
    return [
        "## Inference",
        "",
        f"Greedy, the experiment's first test prompts. generate's best batch was {document['best_generate_batch']}.",
        "",
        "| | examples/s | new tokens/s | peak memory |",
        "|---|---|---|---|",
        *(
            f"| {name} | {row['examples_per_second']:.2f} | {row['tokens_per_second']:.0f} "
            f"| {row['peak_mb'] / 1024:.1f} GB |"
            for name, row in document["inference"].items()
        ),
        "",
        f"In float32 {exact['same']} of {exact['of']} texts are those of generate, one by one. In bfloat16, where "
        f"generate itself writes other texts in other batches, {rough['same']} of {rough['of']} are its best batch's.",
        "",
    ]


def _ratios(document: Result) -> list[str]:
    rows = [f"| {name} | {value:.2f} |" for name, value in document["ratios"].items()]
    return ["## Ratios", "", "| | |", "|---|---|", *rows, ""]


def _scaling(document: Result) -> list[str]:
    lines = [
        "## Time and memory against size",
        "",
        "One measurement each: training steps on drawn tokens (tokens computed a second), and inference over the first "
        "test prompts (tokens written a second).",
    ]
    for title, points in document["scaling"].items():
        lines += ["", f"| {title} | seconds | tokens/s | peak memory |", "|---|---|---|---|"]
        lines += [
            f"| {point['value']} | {point['seconds']:.1f} | {point['tokens'] / point['seconds']:.0f} "
            f"| {point['peak_mb'] / 1024:.1f} GB |"
            for point in points
        ]
    return [*lines, ""]


def _adapters(document: Result) -> list[str]:
    switching = document["adapters"]
    return [
        "## Several adapters on one base",
        "",
        f"Loading the base takes {switching['load_base']:.1f} s, putting one more adapter on it (checked as the stage "
        f"checks it) {switching['add_adapter']:.2f} s, switching from one to another {1000 * switching['switch']:.0f} "
        "ms.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
