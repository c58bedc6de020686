"""A toy of the pipeline: a script of a few lines writes what the real stages write, in the same places and formats."""

import json
from typing import Any

from pipeline.core import contracts
from tests.made import records

RECORDS: dict[str, Any] = {
    "card": records.data_card(),
    "base": records.base_facts(),
    "quantized": records.quantized_facts(perplexity_after=9.5),
    "training": records.training(17, rows=3, final_loss=1.25),
    "contamination": contracts.Contamination("b" * 64, not_tested="contamination.shards is 0"),
    "forgetting": contracts.Forgetting(17, "b" * 64, "c" * 64, []),
    "decoding": records.decoding("base"),
    "scores": records.scores("base"),
}
"""Whole records, of which the script changes what it needs."""
STAGE = (
    f"""
import json
RECORDS = json.loads({json.dumps(contracts.content(RECORDS))!r})
"""
    + r"""
import sys
from pathlib import Path
from ruamel.yaml import YAML

def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content if isinstance(content, str) else json.dumps(content))

def rows(path, content):
    write(path, "".join(json.dumps(row) + "\n" for row in content))

def tuned(seed):
    return "base" if seed == "base" else f"tuned-{seed}"

def run(stage, seed=None):
    p = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
    ids = ["a", "b"]
    if stage == "prepare":
        examples = [dict(id=i, group=i, aspect="who", source=f"text {i}", target=f"ref {i}", lead="") for i in ids]
        rows("out/data/test.jsonl", examples)
        card = RECORDS["card"]
        sizes = card["splits"]["test"] | dict(read=4, rows=3, groups=2, aspects={"who (?)": 3})
        write("out/data/card.json", card | {"splits": {name: sizes for name in ("train", "test")}})
    elif stage == "fetch":
        write("out/models/base.json", RECORDS["base"])
    elif stage == "quantize":
        write("out/models/quantized.json", RECORDS["quantized"])
    elif stage == "contamination":
        write("out/contamination.json", RECORDS["contamination"])
    elif stage == "train":
        write(f"out/adapters/{seed}/adapter_config.json", {"r": p["lora"]["r"]})
        write(f"out/adapters/{seed}/adapter_model.safetensors", f"weights {seed} {p['lora']['r']}")
        validation = [{"step": 0, "loss": 3.0}, {"step": 3, "loss": 2.0}]
        write(f"out/training/{seed}.json", RECORDS["training"] | {"seed": int(seed), "validation": validation})
        steps = ["1,0.0,3.5,0.1,1.0,4,10", "2,0.3,2.5,0.1,1.0,4,11", "3,0.6,1.25,0.1,1.0,4,12"]
        header = "step,epoch,loss,learning_rate,grad_norm,rows,tokens"
        write(f"out/training/{seed}.csv", "\n".join([header, *steps, ""]))
    elif stage == "forget":
        write(f"out/forgetting/{seed}.json", RECORDS["forgetting"] | {"seed": int(seed)})
    elif stage == "infer":
        rows(f"out/predictions/{tuned(seed)}.jsonl", [dict(id=i, prompt_sha256="0", prompt_tokens=1, finish="stop",
            tokens=1, text=f"{tuned(seed)} says {i}") for i in ids])
        write(f"out/predictions/{tuned(seed)}.json", RECORDS["decoding"] | {"variant": tuned(seed)})
    elif stage == "evaluate":
        score = 10.0 if seed == "base" else 30.0
        scored = [dict(id=i, group=i, aspect="who", scores={"rouge1": score + n}) for n, i in enumerate(ids)]
        write(f"out/scores/{tuned(seed)}.json", RECORDS["scores"] | {"variant": tuned(seed), "examples": scored})
    elif stage.startswith("infer-"):
        name = stage.replace("infer", "base")
        rows(f"out/predictions/{name}.jsonl", [])
        write(f"out/predictions/{name}.json", {"variant": name, "off": "it is a toy"})
    elif stage.startswith("evaluate-"):
        name = stage.replace("evaluate", "base")
        write(f"out/scores/{name}.json", {"variant": name, "off": "it is a toy"})
    elif stage == "compare":
        write("reports/metrics.json", {"examples": 2, "rouge1": {"base": 10.5, "tuned": 30.5, "ci_low": 19.0}})
        write("out/comparison/comparison.md", "**Better**: by 20.\n\nand so on")
        write("out/comparison/comparison.json", {})
        for name in ("comparison.svg", "figures/ladder.svg", "tables/scores.csv"):
            write(f"out/comparison/{name}", name)
    elif stage == "track":
        from pipeline.core import params
        from pipeline.record import store, track
        write("reports/index.html", "index.html")
        track.record(p["seeds"], params.Tracking(**p["tracking"]))

if __name__ == "__main__":
    run(*sys.argv[1:])
"""
)
PARAMS = """\
data: {source: here}
prompt: {template: "{source}", instructions: {"who (?)": Who}}
lora: {r: 8, dropout: 0.05, target_modules: [q_proj, v_proj]}
seeds: [17]
train: {learning_rate: 1e-3}
tracking: {uri: null, experiment: toy}
"""
DVC_YAML = """\
stages:
  prepare: {cmd: python toy.py prepare, params: [data], outs: [out/data]}
  fetch: {cmd: python toy.py fetch, outs: [out/models/base.json]}
  quantize: {cmd: python toy.py quantize, deps: [out/models/base.json], outs: [out/models/quantized.json]}
  contamination:
    cmd: python toy.py contamination
    deps: [out/models/base.json, out/data]
    outs: [out/contamination.json]
  train:
    matrix: {seed: "${seeds}"}
    cmd: python toy.py train ${item.seed}
    params: [prompt, lora, train]
    deps: [out/models/quantized.json, out/data]
    outs: ["out/adapters/${item.seed}", "out/training/${item.seed}.json", "out/training/${item.seed}.csv"]
  infer:
    matrix: {variant: [base]}
    cmd: python toy.py infer ${item.variant}
    params: [prompt]
    deps: [out/models/quantized.json, out/data]
    outs: [out/predictions/base.jsonl, out/predictions/base.json]
  infer-tuned:
    matrix: {seed: "${seeds}"}
    cmd: python toy.py infer ${item.seed}
    params: [prompt]
    deps: ["out/adapters/${item.seed}", out/data]
    outs: ["out/predictions/tuned-${item.seed}.jsonl", "out/predictions/tuned-${item.seed}.json"]
  forget:
    matrix: {seed: "${seeds}"}
    cmd: python toy.py forget ${item.seed}
    deps: ["out/adapters/${item.seed}"]
    outs: ["out/forgetting/${item.seed}.json"]
  evaluate:
    matrix: {variant: [base]}
    cmd: python toy.py evaluate ${item.variant}
    deps: [out/predictions/base.jsonl, out/predictions/base.json]
    outs: [out/scores/base.json]
  evaluate-tuned:
    matrix: {seed: "${seeds}"}
    cmd: python toy.py evaluate ${item.seed}
    deps: ["out/predictions/tuned-${item.seed}.jsonl"]
    outs: ["out/scores/tuned-${item.seed}.json"]
  infer-unquantized:
    cmd: python toy.py infer-unquantized
    params: [prompt]
    deps: [out/models/base.json, out/data]
    outs: [out/predictions/base-unquantized.jsonl, out/predictions/base-unquantized.json]
  evaluate-unquantized:
    cmd: python toy.py evaluate-unquantized
    deps: [out/predictions/base-unquantized.jsonl, out/predictions/base-unquantized.json]
    outs: [out/scores/base-unquantized.json]
  infer-shots:
    cmd: python toy.py infer-shots
    params: [prompt]
    deps: [out/models/quantized.json, out/data]
    outs: [out/predictions/base-shots.jsonl, out/predictions/base-shots.json]
  evaluate-shots:
    cmd: python toy.py evaluate-shots
    deps: [out/predictions/base-shots.jsonl, out/predictions/base-shots.json]
    outs: [out/scores/base-shots.json]
  compare:
    cmd: python toy.py compare
    params: [seeds]
    deps: [out/scores]
    outs: [out/comparison]
    metrics:
      - reports/metrics.json: {cache: false}
  track:
    cmd: python toy.py track
    params: [seeds, data, prompt, lora, train]
    deps: [out/adapters, out/data, out/models/base.json, out/models/quantized.json, out/predictions, out/scores,
      out/training, out/forgetting, out/contamination.json, out/comparison, reports/metrics.json]
    outs:
      - out/receipt.json: {cache: false}
      - reports/comparison.md: {cache: false}
      - reports/comparison.svg: {cache: false}
      - reports/figures: {cache: false}
      - reports/tables: {cache: false}
"""
