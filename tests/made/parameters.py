"""Parameters of small experiments, and their edits."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core import params, paths, records, yaml12
from tests import ROOT


def tiny_params(tiny_model: Path, data: Path) -> dict[str, Any]:
    """The default params.yaml, made small: local sources, tiny limits."""
    content: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["data"] |= {
        "source": str(data),
        "sha256": records.sha256_tree(data),
        "format": "table",
        "files": {split: f"{split}.jsonl" for split in paths.SPLITS},
        "columns": {name: name for name in ("id", "group", "aspect", "source", "target")},
    }
    content["model"] |= {"source": str(tiny_model), "sha256": records.sha256_tree(tiny_model), "dtype": "float32"}
    content["quantize"] |= {"perplexity_tokens": 256}
    content["prompt"] |= {"max_tokens": 200, "instructions": {"what": "Say what.", "who": "Say who."}}
    content["lora"] |= {"r": 4, "alpha": 8}
    content["train"] |= {"batch_size": 4, "micro_batch_tokens": 64, "learning_rate": 1e-2}
    probe: dict[str, Any] = {
        "name": "general",
        "style": "plain",
        "source": str(data),
        "sha256": records.sha256_tree(data),
    }
    probe |= {"files": "general.jsonl", "encoding": "utf-8", "column": "text", "html": False}
    content["forget"] = {"probes": [probe | {"tokens": 200, "window": 32}]}
    content["generation"] |= {"max_new_tokens": 8, "batch_size": 4}
    content["baseline"] |= {"shots": 2, "rows": 4}
    content["contamination"] |= {"tokens": 64}
    content["compare"] |= {"bootstrap_samples": 1000, "examples": 2}
    content["runtime"] |= {"device": "cpu", "threads": 1}
    return content


def lora(**settings: Any) -> params.Lora:
    """Plain LoRA of rank 4 on every linear layer, unless `settings` have it otherwise."""
    given: dict[str, Any] = {
        "r": 4, "alpha": 8.0, "rslora": False, "dropout": 0.0, "target_modules": "all-linear", "layers": None,
        "rank_pattern": {}, "alpha_pattern": {}, "dora": False, "init": "default", "train_only": None,
        "plus_ratio": 1.0, "bias": "none", "modules_to_save": [],
    }  # fmt: skip
    return params.Lora.model_validate(given | settings)


def edit(**sections: dict[str, Any]) -> None:
    """Change values of params.yaml, as a user does."""
    content = yaml12.read(paths.PARAMS)
    for name, values in sections.items():
        content[name] |= values
    YAML().dump(content, paths.PARAMS)


def edit_probe(**change: Any) -> None:
    """Change values of the first probe of forgetting in params.yaml."""
    content = yaml12.read(paths.PARAMS)
    content["forget"]["probes"][0] |= change
    YAML().dump(content, paths.PARAMS)


def probe_of(folder: Path, files: str | list[str], **change: Any) -> params.Probe:
    """A probe `own` of the files of a folder: plain text, 64 tokens in windows of 16."""
    given: dict[str, Any] = {"name": "own", "style": "plain", "source": str(folder), "files": files}
    given |= {"sha256": records.sha256_tree(folder), "encoding": "utf-8", "column": None, "html": False}
    return params.Probe.model_validate(given | {"tokens": 64, "window": 16} | change)


def with_probe(given: params.Forget, **change: Any) -> params.Forget:
    """Forgetting by the first probe alone, with some of its values changed."""
    return given.model_copy(update={"probes": [given.probes[0].model_copy(update=change)]})


def runtime(**settings: Any) -> params.Runtime:
    """One process on one CPU thread, unless `settings` have it otherwise."""
    given: dict[str, Any] = {
        "device": "cpu", "threads": 1, "processes": 1, "sharding": "none", "gradient_checkpointing": False,
        "keep_dequantized": True,
    }  # fmt: skip
    return params.Runtime(**given | settings)


def rewrite(**values: Any) -> None:
    """Replace whole sections, or values at the top, of params.yaml."""
    YAML().dump(yaml12.read(paths.PARAMS) | values, paths.PARAMS)
