"""Do several processes give the results of one, on the default experiment's model and data?

    python -m bench.processes [--steps 20] [--batch 12] [--rows 60] [--project .]

It copies the base and the data of a project that has run, and compares, with one thread in each process:
training, the loss of each step by 2 processes over gloo and by 1, in the base's dtype and in float32; inference, the
predictions of 2 and of 1 for some test rows; FSDP, adapter and predictions of 2 processes that share the base and of 2
with a base each; attention heads, unquantized and in float32, logits and training losses of 3 and of 1.
It exits with 1 if losses or logits differ by more than 1e-4 in float32, or if files differ that should be the same.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core import contracts, params, paths, records, yaml12
from pipeline.core.contracts import QuantizedFacts, TrainingSummary
from pipeline.model import checkpoint, devices, load
from pipeline.model import processes as distributed
from pipeline.model.prompt import text_ids
from pipeline.quantize import quantize

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--batch", type=int, default=12, help="rows of a step")
    parser.add_argument("--rows", type=int, default=60, help="of the test split")
    parser.add_argument("--project", type=Path, default=Path())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        place = Path(folder)
        prepare(place, given.project.resolve(), given.steps, given.batch, given.rows)
        with chdir(place):
            fine = inference()
            fine &= sharing()
            training(2)
            to_float32()
            requantize("nf4")
            fine &= training(2) <= TOLERANCE
            requantize("none")
            fine &= logits() <= TOLERANCE
            fine &= training(3, sharding="tensor") <= TOLERANCE
    return 0 if fine else 1


def prepare(place: Path, project: Path, steps: int, batch: int, rows: int) -> None:
    """Make a project with another's base and data, cut to so many training steps and so many rows of the test split."""
    for path in (paths.BASE, paths.BASE_FACTS, paths.QUANTIZED, paths.QUANTIZED_FACTS):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (project / path).is_dir() else shutil.copy
        copy(project / path, place / path)
    for name in ("dvc.yaml", "params.yaml", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    # With smaller batches inference has several rounds.
    generation = {"batch_size": 4, "recheck": 2}
    edit(place, train={"batch_size": batch}, generation=generation, runtime={"threads": 1, "device": "cpu"})
    wanted = {"train": steps * batch, "validation": 24, "test": rows}
    for split, count in wanted.items():
        lines = (project / paths.split(split)).read_text(encoding="utf-8").split("\n")[:count]
        (place / paths.DATA).mkdir(exist_ok=True)
        (place / paths.split(split)).write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def edit(place: Path, **sections: Mapping[str, object]) -> None:
    """Change values of a project's params.yaml."""
    content = yaml12.read(place / paths.PARAMS)
    for name, values in sections.items():
        content[name] |= values
    YAML().dump(content, place / paths.PARAMS)


def stage(processes: int, *command: str, **settings: object) -> float:
    """Run a stage over so many processes, with these settings of `runtime`; its seconds."""
    edit(Path(), runtime={"processes": processes, "sharding": "none", "keep_dequantized": True, **settings})
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - started


def training(processes: int, **settings: object) -> float:
    """The largest relative difference of a step's loss, or of a validation's, between so many processes and one."""
    seen: list[list[float]] = []
    seconds = []
    for count, chosen in ((1, {}), (processes, settings)):
        seconds.append(stage(count, "stages.train", "--seed", "17", **chosen))
        steps = contracts.read_curve(paths.training_log(17))
        validation = contracts.read(paths.training_summary(17), TrainingSummary).validation
        seen.append([one.loss for one in steps] + [one.loss for one in validation])
    differences: list[float] = [abs(one - two) / one for one, two in zip(*seen, strict=True)]
    largest, validated = max(differences[: len(steps)]), max(differences[len(steps) :])
    facts = contracts.read(paths.QUANTIZED_FACTS, QuantizedFacts)
    how = ", ".join([facts.method, facts.dtype, *map(str, settings.values())])
    print(
        f"training, {how}, {len(steps)} steps: the losses of {processes} processes differ from those of 1 by "
        f"{largest:.1e} at most (relative; at the first step {differences[0]:.1e}), validation losses by "
        f"{validated:.1e}; {seconds[0]:.0f} s and {seconds[1]:.0f} s",
        flush=True,
    )
    return float(max(differences))


def inference() -> bool:
    """Whether two processes write what one writes."""
    rows = len(records.read_rows(paths.split("test"), records.Example))
    return alike(
        f"inference, {rows} rows: predictions and conditions of 1 process and of 2",
        [lambda: stage(1, "stages.infer"), lambda: stage(2, "stages.infer")],
        lambda: [paths.predictions("base"), paths.decoding("base")],
    )


def sharing() -> bool:
    """Whether processes that share a base write what they write with one each."""

    def both(sharding: str) -> float:
        settings = {"sharding": sharding, "keep_dequantized": False}
        return stage(2, "stages.train", "--seed", "17", **settings) + stage(2, "stages.infer", **settings)

    return alike(
        "FSDP: adapter, curve and predictions of 2 processes with a base each and with a shared one",
        [lambda: both("none"), lambda: both("fsdp")],
        lambda: [*sorted(paths.adapter(17).iterdir()), paths.training_log(17), paths.predictions("base")],
    )


def alike(what: str, runs: Sequence[Callable[[], float]], files: Callable[[], list[Path]]) -> bool:
    """Whether two runs, each of which gives its seconds, write the same bytes."""
    seconds, seen = [], []
    for run in runs:
        seconds.append(run())
        seen.append([records.sha256_file(path) for path in files()])
    same = seen[0] == seen[1]
    print(f"{what}: {'' if same else 'not '}the same bytes; {seconds[0]:.0f} s and {seconds[1]:.0f} s", flush=True)
    return same


def logits() -> float:
    """The largest difference between the logits by 3 processes that divide the heads, and by transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    devices.quieten()
    whole = AutoModelForCausalLM.from_pretrained(paths.BASE).eval()
    with torch.no_grad():
        expected_1xLxV = whole(input_ids=_text()).logits
    code = "from bench import processes; processes.member()"
    os.environ["PYTHONPATH"] = str(ROOT)
    held = distributed.launch([sys.executable, "-c", code], 3, Path("members"))["parameters"]
    largest = float((torch.load("logits.pt") - expected_1xLxV).abs().max())
    config = whole.config
    print(
        f"heads: {config.num_attention_heads} and {config.num_key_value_heads} over 3 processes, "
        f"{expected_1xLxV.shape[1]} tokens: logits differ by {largest:.1e} at most; parameters "
        f"{sum(p.numel() for p in whole.parameters()):,}, of which the processes hold {held}",
        flush=True,
    )
    return largest


def member() -> None:
    """One of the three."""
    distributed.member(_part)


def _part() -> dict[str, Any]:
    import torch

    runtime = params.load().runtime.model_copy(update={"processes": 3, "sharding": "tensor"})
    model = load.quantized(devices.choose(runtime), runtime.keep_dequantized, runtime.sharding)
    with torch.no_grad():
        logits_1xLxV = model(input_ids=_text(), use_cache=False).logits
    parameters = distributed.gather(sum(getattr(one, "_local_tensor", one).numel() for one in model.parameters()))
    if distributed.rank() == 0:
        torch.save(logits_1xLxV, "logits.pt")
    torch.distributed.destroy_process_group()
    return {"parameters": parameters}


def _text() -> Any:
    """A text's token ids, 1xL."""
    import torch

    source = records.read_rows(paths.split("test"), records.Example)[0].source
    return torch.tensor([text_ids(checkpoint.tokenizer(), source)])


def to_float32() -> None:
    """The same base in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(paths.BASE, dtype=torch.float32).save_pretrained(paths.BASE)
    facts: dict[str, Any] = records.read_json(paths.BASE_FACTS)
    records.write_json(paths.BASE_FACTS, facts | {"dtype": "float32", "sha256": records.sha256_tree(paths.BASE)})


def requantize(method: str) -> None:
    shutil.rmtree(paths.QUANTIZED)
    changes = {"method": method, "double_quantization": method == "nf4", "perplexity_tokens": 256}
    edit(Path(), quantize=changes)
    given = params.load()
    quantize.write_quantized(given.quantize, given.runtime)


if __name__ == "__main__":
    sys.exit(main())
