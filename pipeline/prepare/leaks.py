"""The leak guard: drops rows whose source is, or nearly is, one of a split that measures.

Nearly is n-gram containment over 8 words, as in the contamination studies of large models (GPT-3, arXiv 2005.14165,
appendix C, over 8 to 13 words).
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.core import progress
from pipeline.core.records import Example
from pipeline.core.text import alike, runs, words
from pipeline.prepare.splits import Split, context, plain

SHINGLE_WORDS = 8
MANY_OWNERS = 1000
"""Counting this many owners of a text's shingles takes longer than looking up an earlier count."""


class Overlap:
    """Tells whether a text equals, or nearly equals, one of the given texts.

    Exactly: equal but for case, white space and the way to write a character (`pipeline.core.text.alike`). Nearly: one
    of the given texts holds at least the share `threshold` of the text's distinct 8-word shingles. Words are runs of
    letters, marks and digits, without case; in scripts without spaces, single characters. A text of fewer than 8 words
    has no shingle and is compared exactly only.

    Shingles are 64-bit hashes that depend on the words alone. Memory: 12 bytes for each shingle of the given texts;
    time: a binary search for each shingle of the other.
    """

    def __init__(self, texts: Iterable[str], threshold: float) -> None:
        self.threshold = threshold
        self.words: dict[str, int] = {}
        unique = list(dict.fromkeys(texts))
        self.exact = {plain(text) for text in unique}
        hashes = [self._shingles(text) for text in unique]
        owners = np.repeat(np.arange(len(unique), dtype=np.int32), [len(some) for some in hashes])
        joined = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(joined, kind="stable")
        self.hashes, self.owners = joined[order], owners[order]
        self.counted: dict[tuple[int, bytes], bool] = {}

    def kind(self, text: str) -> str | None:
        """ "exact", "near" or None."""
        if plain(text) in self.exact:
            return "exact"
        shingles = self._shingles(text)
        start = np.searchsorted(self.hashes, shingles, side="left")
        end = np.searchsorted(self.hashes, shingles, side="right")
        hit = end > start
        if not len(shingles) or np.count_nonzero(hit) / len(shingles) < self.threshold:
            return None
        return "near" if self._is_near(start[hit], end[hit], len(shingles)) else None

    def _is_near(self, start: NDArray[np.int64], end: NDArray[np.int64], shingles: int) -> bool:
        """Whether one text owns enough of `shingles` shingles, of which self.owners[start:end] own one each.

        A template that all rows share has them all as owners, for every row again. Texts with the same hits have the
        same answer, so the time grows with the rows, and not with their square.
        """
        known = (shingles, start.tobytes())
        if known in self.counted:
            return self.counted[known]
        owners = np.concatenate([self.owners[a:b] for a, b in zip(start, end, strict=True)])
        near = bool(np.bincount(owners).max() / shingles >= self.threshold)
        if len(owners) >= MANY_OWNERS:
            self.counted[known] = near
        return near

    def _shingles(self, text: str) -> NDArray[np.uint64]:
        found = words(" ".join(runs(alike(text))))
        if len(found) < SHINGLE_WORDS:
            return np.empty(0, np.uint64)
        hashes = np.fromiter(map(self._word, found), np.uint64, len(found))
        rolled = np.zeros(len(found) - SHINGLE_WORDS + 1, np.uint64)
        for offset in range(SHINGLE_WORDS):  # a polynomial in an odd number, modulo 2**64
            rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(rolled)]
        return np.unique(rolled)

    def _word(self, word: str) -> int:
        # Not hash(): it differs between processes.
        if (known := self.words.get(word)) is None:
            known = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
            self.words[word] = known
        return known


def drop(splits: Mapping[str, Split], threshold: float) -> dict[str, dict[str, int]]:
    """Drop from train what validation or test holds, and from validation what test holds.

    Returns the number of rows by kind ("exact", "near") for each pair ("train in test"). A training row that validation
    and test both hold counts in both pairs; its reason names test.
    """
    pairs = [("train", "test"), ("train", "validation"), ("validation", "test")]
    contexts = {name: [context(row) for row in split.rows] for name, split in splits.items()}
    held_out = {name: Overlap(contexts[name], threshold) for name in ("validation", "test")}
    found: dict[tuple[str, str], dict[str, str | None]] = {}
    counts = {}
    with progress.bar("checking overlap", sum(len(splits[suspect].rows) for suspect, _ in pairs), "rows") as advance:
        for suspect, other in pairs:
            kinds = found[suspect, other] = {}
            for text in contexts[suspect]:
                if text not in kinds:
                    kinds[text] = held_out[other].kind(text)
                advance(1)
            tally = Counter(kinds[text] for text in contexts[suspect])
            counts[f"{suspect} in {other}"] = {"exact": tally["exact"], "near": tally["near"]}

    def leak(row: Example, suspect: str) -> str | None:
        return next((f"overlaps {b}" for a, b in pairs if a == suspect and found[a, b][context(row)]), None)

    for suspect in ("train", "validation"):
        splits[suspect].remove(partial(leak, suspect=suspect), splits[suspect].dropped)
    return counts
