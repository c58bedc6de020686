"""The header of a GGUF file, checked before anything reads it: every length and count must lie within the file.

`gguf` and transformers trust the numbers in it: a count of 2**60 keeps them busy for years, and they build as many
layers as it says. Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

import struct
from pathlib import Path
from typing import BinaryIO

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
DIMENSIONS = 4
LONGEST = 2**16
"""Bytes of a text that is read; longer texts are skipped."""
MOST_ITEMS = 10_000_000
"""Items of all arrays in one file. A vocabulary of 262,144 words has three arrays of as many, and one of merges."""


def check(path: Path) -> None:
    """ValueError if the header leads out of the file, is larger than any model's, or is not of a whole model."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        walk = _Walk(file, path.stat().st_size)
        version, tensors, fields = walk.number("I"), walk.number("Q"), walk.number("Q")
        if version in (2 << 24, 3 << 24):
            raise ValueError("it is big-endian, for other machines: `gguf-convert-endian <file> little` turns it round")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is not known")
        for _ in range(walk.items(fields, 8 + 4 + 1)):
            name = walk.text()
            _require_whole(name, walk.value(walk.number("I")))
        for _ in range(walk.items(tensors, 8 + 4 + 4 + 8)):
            walk.skip(walk.number("Q"))
            dimensions = walk.number("I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            walk.skip(8 * dimensions + 4 + 8)


def _require_whole(name: bytes, value: bytes) -> None:
    """ValueError for a field that says that the file is a part of a model, or not a model."""
    if name == b"split.count" and (parts := int.from_bytes(value, "little")) > 1:
        raise ValueError(f"it is one of {parts} parts: `llama-gguf-split --merge` of llama.cpp makes one file of them")
    if name == b"general.type" and value != b"model":
        raise ValueError(f"it holds no model, but says general.type = {value.decode(errors='replace')!r}")


class _Walk:
    """A position in the header, and the number of items announced so far."""

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

    def read(self, length: int) -> bytes:
        """The next `length` bytes; more than `LONGEST` are skipped, and nothing is returned."""
        start = self.file.tell()
        self.skip(length)
        if length > LONGEST:
            return b""
        self.file.seek(start)
        return self.file.read(length)

    def text(self) -> bytes:
        return self.read(self.number("Q"))

    def items(self, count: int, least: int) -> int:
        """`count`; ValueError if the rest of the file cannot hold as many items of `least` bytes."""
        self.seen += count
        if count * least > self.size - self.file.tell() or self.seen > MOST_ITEMS:
            raise ValueError(f"{count:,} items are announced where {self.size - self.file.tell():,} bytes are left")
        return count

    def value(self, kind: int) -> bytes:
        """The bytes of a value; nothing for an array."""
        if kind == STRING:
            return self.text()
        if kind in SIZES:
            return self.read(SIZES[kind])
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in SIZES:
                self.skip(self.items(count, SIZES[kind]) * SIZES[kind])
            elif kind == STRING:
                for _ in range(self.items(count, 8)):
                    self.skip(self.number("Q"))
            else:
                raise ValueError(f"an array of type {kind}")
            return b""
        raise ValueError(f"a value of type {kind}")
