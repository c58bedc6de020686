"""The header of a GGUF file, read without trust: every length and count must lie within the file.

`gguf` and transformers trust the numbers in it: a count of 2**60 keeps them busy for years, and they build as many
layers as it says. Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path

KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The numbers by their types, as `struct` names them; 8 is a text, 9 an array."""
SIZES = {kind: struct.calcsize(f"<{name}") for kind, name in KINDS.items()}
"""Bytes of a number by its type."""
STRING, ARRAY = 8, 9
DIMENSIONS = 4
LONGEST = 2**16
"""Bytes of a text that is kept; of longer ones the beginning is."""
MOST_ITEMS = 10_000_000
"""Items of all arrays in one file. A vocabulary of 262,144 words has three arrays of as many, and one of merges."""
MOST_TENSORS = 100_000
"""A thousand layers, which are the most, have some tens of thousands."""
ALIGNMENT = 32
"""Tensors begin at multiples of so many bytes, if the file does not say another number."""

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Tensor:
    """What the header says of one tensor. `shape` has the row's length first; `start` counts from the file's begin."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a file that are single values, the number of items in its arrays, and its tensors, by name."""

    values: dict[str, Value]
    arrays: dict[str, int]
    tensors: dict[str, Tensor]


def read(path: Path) -> Header:
    """The header of a file. ValueError if it leads out of the file, is larger than any model's, or says that the file
    is not a whole model."""
    if not path.stat().st_size:
        raise ValueError("it does not begin with GGUF")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(content).header()


class _Walk:
    """A position in the header, and the number of items announced so far."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.size, self.at, self.seen = content, len(content), 0, 0

    def header(self) -> Header:
        if self.content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.skip(4)
        version, tensors, fields = (int(self.number(kind)) for kind in "IQQ")
        if version in (2 << 24, 3 << 24):
            raise ValueError("it is big-endian, for other machines: `gguf-convert-endian <file> little` turns it round")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is not known")
        found = Header({}, {}, {})
        for _ in range(self.items(fields, 8 + 4 + 1)):
            self.field(found)
        if tensors > MOST_TENSORS:
            raise ValueError(f"{tensors:,} tensors: {MOST_TENSORS:,} are the most")
        said = {self.text(): self.tensor() for _ in range(self.items(tensors, 8 + 4 + 4 + 8))}
        step = max(1, int(found.values.get("general.alignment", ALIGNMENT)))
        data = -(-self.at // step) * step
        found.tensors.update({name: replace(one, start=data + one.start) for name, one in said.items()})
        return found

    def field(self, found: Header) -> None:
        """Read one field. ValueError for one that says that the file is a part of a model, or not a model."""
        name, kind = self.text(), int(self.number("I"))
        if kind == ARRAY:
            found.arrays[name] = self.array()
            return
        value = found.values[name] = self.value(kind)
        if name == "split.count" and isinstance(value, int) and value > 1:
            raise ValueError(
                f"it is one of {value} parts: `llama-gguf-split --merge` of llama.cpp makes one file of them"
            )
        if name == "general.type" and value != "model":
            raise ValueError(f"it holds no model, but says general.type = {value!r}")

    def tensor(self) -> Tensor:
        """The tensor whose name was read, with its start as counted from the end of the header."""
        dimensions = int(self.number("I"))
        if dimensions > DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(dimensions))
        return Tensor(shape, int(self.number("I")), int(self.number("Q")))

    def number(self, kind: str) -> int | float | bool:
        length = struct.calcsize(f"<{kind}")
        if length > self.size - self.at:
            raise ValueError("it is cut off")
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += length
        found: int | float | bool = value
        return found

    def skip(self, length: int) -> None:
        if length > self.size - self.at:
            raise ValueError(f"{length:,} bytes are announced where {self.size - self.at:,} are left")
        self.at += length

    def text(self) -> str:
        length = int(self.number("Q"))
        start = self.at
        self.skip(length)
        return self.content[start : start + min(length, LONGEST)].decode("utf-8", "replace")

    def items(self, count: int, least: int) -> int:
        """`count`; ValueError if the rest of the file cannot hold as many items of `least` bytes."""
        self.seen += count
        if count * least > self.size - self.at or self.seen > MOST_ITEMS:
            raise ValueError(f"{count:,} items are announced where {self.size - self.at:,} bytes are left")
        return count

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return self.text()
        if kind in KINDS:
            return self.number(KINDS[kind])
        raise ValueError(f"a value of type {kind}")

    def array(self) -> int:
        """Skip an array, and give the number of its items."""
        kind, count = int(self.number("I")), int(self.number("Q"))
        if kind in SIZES:
            self.skip(self.items(count, SIZES[kind]) * SIZES[kind])
        elif kind == STRING:
            self.texts(self.items(count, 8))
        else:
            raise ValueError(f"an array of type {kind}")
        return count

    def texts(self, count: int) -> None:
        """Skip as many texts. A vocabulary has hundreds of thousands, so this is the loop that must be short."""
        length_at, at, last = struct.Struct("<Q").unpack_from, self.at, self.size - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + length_at(self.content, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        raise ValueError("a text in an array is longer than the file")
