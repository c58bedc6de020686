"""The header of a GGUF file, walked before anything reads it: every length and count must lie within the file.

`gguf` and transformers believe the numbers that they find: a count of 2**60 keeps them busy for years, and a wrong
number of layers has them build as many. Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

import struct
from pathlib import Path
from typing import BinaryIO

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
DIMENSIONS = 4
MOST_ITEMS = 10_000_000
"""In one file; a vocabulary of 262,144 words has three arrays of them, and one of as many merges."""


def check(path: Path) -> None:
    """ValueError where the header of a little-endian GGUF file leads out of it, or is larger than any is."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        walk = _Walk(file, path.stat().st_size)
        version, tensors, fields = walk.number("I"), walk.number("Q"), walk.number("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is not known")
        for _ in range(walk.items(fields, 8 + 4 + 1)):
            walk.skip(walk.number("Q"))
            walk.value(walk.number("I"))
        for _ in range(walk.items(tensors, 8 + 4 + 4 + 8)):
            walk.skip(walk.number("Q"))
            dimensions = walk.number("I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            walk.skip(8 * dimensions + 4 + 8)


class _Walk:
    """A place in the header, and how many items lie behind it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.seen = file, size, 0

    def number(self, kind: str) -> int:
        read = self.file.read(struct.calcsize(kind))
        if len(read) < struct.calcsize(kind):
            raise ValueError("it is cut off")
        (value,) = struct.unpack(f"<{kind}", read)
        return int(value)

    def skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            raise ValueError(f"{length:,} bytes are announced where {self.size - self.file.tell():,} are left")
        self.file.seek(length, 1)

    def items(self, count: int, least: int) -> int:
        """`count`, if as many items of `least` bytes can follow."""
        self.seen += count
        if count * least > self.size - self.file.tell() or self.seen > MOST_ITEMS:
            raise ValueError(f"{count:,} items are announced where {self.size - self.file.tell():,} bytes are left")
        return count

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in SIZES:
                self.skip(self.items(count, SIZES[kind]) * SIZES[kind])
            elif kind == STRING:
                for _ in range(self.items(count, 8)):
                    self.skip(self.number("Q"))
            else:
                raise ValueError(f"an array of type {kind}")
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"a value of type {kind}")
