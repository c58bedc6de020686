"""The cost of each GGUF type for the default experiment's model: perplexity of validation references by llama.cpp.

    python -m bench.gguf [--rows 30] [--types F16 Q8_0 ...]

It needs the extra llama-cpp and reads the outputs of the default experiment (`dvc repro` first). It prints two tables:
the perplexity of the base in NF4 and of the base as it was fetched, each alone and with the adapter of the first seed;
and the relative change of the linear layers' weights by each type, |W - Q(W)| / |W| (Frobenius).
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from claims import bits
from pipeline import gguf as gguf_file
from pipeline.core import params, paths, records
from pipeline.export import parity
from pipeline.infer import backend_llamacpp
from pipeline.model import checkpoint, devices
from pipeline.model.prompt import Encoder, Row

BASES = {"in NF4": paths.QUANTIZED, "as fetched": paths.BASE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30, help="of the validation split, whole groups")
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
    given = parser.parse_args()
    devices.quieten()
    context = records.read_json(paths.QUANTIZED_FACTS)["context"]
    rows = parity.references(Encoder(checkpoint.tokenizer(), params.load().prompt, context), given.rows)
    print(f"perplexity of {sum(len(row.completion) for row in rows)} tokens in {len(rows)} references")
    print("| type | " + " | ".join(f"base {name} | tuned" for name in BASES) + " |")
    for kind in given.types:
        cells = [perplexity(folder, adapted, kind, rows) for folder in BASES.values() for adapted in (False, True)]
        print(f"| {kind} | " + " | ".join(f"{value:.1f}" for value in cells) + " |", flush=True)
    print("error of the weights")
    before = {name: linear(folder) for name, folder in BASES.items()}
    fetched = before["as fetched"]
    print(f"NF4 of what was fetched: {error(fetched, before['in NF4']):.1%}")
    for kind in given.types:
        after = {name: rounded(weights, kind) for name, weights in before.items()}
        print(
            f"{kind}: of NF4 {error(before['in NF4'], after['in NF4']):.1%}, of what was fetched "
            f"{error(fetched, after['as fetched']):.1%}, after NF4 from what was fetched "
            f"{error(fetched, after['in NF4']):.1%}"
        )


def perplexity(folder: Path, adapted: bool, kind: str, rows: list[Row]) -> float:
    tokenizer = checkpoint.tokenizer()
    tokens = max(len(row.prompt) + len(row.completion) for row in rows) + 2
    with tempfile.TemporaryDirectory(prefix="gguf-") as name:
        base, adapter = Path(name) / "base.gguf", Path(name) / "adapter.gguf"
        gguf_file.write_base(folder, base, kind)
        if adapted:
            gguf_file.write_adapter(paths.adapter(params.load().seeds[0]), folder, adapter, "F32")
        server = backend_llamacpp.serve(base, adapter if adapted else None, kind, 1, tokens, 2, "cpu")
        stops = frozenset([tokenizer.eos_token_id])
        engine = backend_llamacpp.Engine(server, stops, 1, tokenizer, "cpu", 2, {})
        total = sum(sum(backend_llamacpp.losses(engine, row.prompt, row.completion)) for row in rows)
    return math.exp(total / sum(len(row.completion) for row in rows))


def linear(folder: Path) -> Any:
    """The linear layers' weights as float32, in rows of 32, which are the blocks of these types."""
    weights = gguf_file.weights(folder)
    names = sorted(name for name, weight in weights.items() if weight.ndim > 1 and "embed" not in name)
    return np.concatenate([weights[name].float().numpy().reshape(-1, 32) for name in names])


def rounded(weights: Any, kind: str) -> Any:
    type_ = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(weights, type_), type_)


def error(before: Any, after: Any) -> float:
    squares, lost, _ = bits.products(before, after)
    return float((lost / squares) ** 0.5)


if __name__ == "__main__":
    main()
