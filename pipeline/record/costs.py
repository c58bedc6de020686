"""What each stage cost, if it was this folder that computed the present result.

A result from a cache cost this experiment nothing. What it cost another experiment is in the run of that one.
"""

from collections.abc import Sequence
from pathlib import Path

from pipeline.core import contracts, paths, records
from pipeline.core.contracts import Cost


def of_stages(seeds: Sequence[int], root: Path = Path()) -> dict[str, Cost | None]:
    """The cost of each stage of the project in `root`; None if its result came from another folder or a cache."""
    results = {"prepare": paths.DATA_CARD, "fetch": paths.BASE_FACTS, "quantize": paths.QUANTIZED_FACTS}
    results |= {"infer-base": paths.predictions(paths.variant(None))}
    results |= {f"infer-{name}": paths.predictions(f"base-{name}") for name in ("unquantized", "shots")}
    results["contamination"] = paths.CONTAMINATION
    for seed in seeds:
        results[f"train-{seed}"] = paths.training_summary(seed)
        results[f"infer-tuned-{seed}"] = paths.predictions(paths.variant(seed))
        results[f"forget-{seed}"] = paths.forgetting(seed)
    return {stage: of_result(result, root) for stage, result in results.items()}


def of_result(result: Path, root: Path = Path()) -> Cost | None:
    """The cost of the stage that wrote `result`; None if it was noted for other content, or not at all."""
    noted = root / paths.costs(result)
    if not noted.exists():
        return None
    cost = contracts.read(noted, Cost)
    return cost if cost.result_sha256 == records.sha256_path(root / result) else None
