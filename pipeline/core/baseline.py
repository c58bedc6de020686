"""The variants of the base that section `baseline` asks for: which test rows they answer, and when there are none."""

from collections.abc import Sequence

from pipeline.core.records import Example


def rows(test: Sequence[Example], most: int | None) -> list[int]:
    """The places, from 0, of the test rows that a variant of `baseline` answers.

    Whole groups, evenly spread over `test`, that have `most` rows together at most, but at least one group. None: all.
    """
    groups: dict[str, list[int]] = {}
    for place, example in enumerate(test):
        groups.setdefault(example.group, []).append(place)
    if most is None or len(test) <= most:
        return list(range(len(test)))
    places, count = list(groups.values()), len(groups)
    while True:
        chosen = [place for at in range(count) for place in places[at * len(places) // count]]
        if len(chosen) <= most or count == 1:
            return sorted(chosen)
        count = max(1, min(count - 1, count * most // len(chosen)))


def unquantized_off(asked: bool, method: str) -> str | None:
    """Why there is no variant without quantization (`baseline.unquantized`, `quantize.method`); None if there is."""
    if not asked:
        return "baseline.unquantized is false"
    return "quantize.method is none: the base is not quantized" if method == "none" else None


def shots_off(shots: int) -> str | None:
    """Why there is no variant with demonstrations (`baseline.shots`); None if there is."""
    return None if shots else "baseline.shots is 0"
