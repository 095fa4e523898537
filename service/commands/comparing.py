"""`python -m service adapters diff A B`: what differs between two adapters, by their files.

Each side is a file, or a name on the service with or without `@revision`. Nothing here needs torch.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.shell import CommandFailed

if TYPE_CHECKING:
    from adapters.difference import Difference
    from adapters.format.spec import AdapterSpec
    from service.client import Client

SUFFIX = ".safetensors"
# As in `adapters.format.files`, which imports torch.
_METADATA, _SPEC = "__metadata__", "idspam"
_MOST_HEADER_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two. tensors: hashes of their bytes, by name."""

    shown: str
    revision: str
    size: int
    spec: "AdapterSpec"
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, shown: str, content: bytes) -> "Side":
        """
        Raises:
            CommandFailed: this is no adapter file, or a package is missing.
        """
        try:
            from adapters.errors import InvalidAdapter
            from adapters.format.spec import AdapterSpec
        except ModuleNotFoundError as error:
            raise CommandFailed(f"this needs the package {error.name}") from None
        try:
            header, start = _header(content)
            spec = AdapterSpec.from_json(header.pop(_METADATA)[_SPEC])
            tensors = {name: _hash(content, start, entry) for name, entry in header.items()}
        except InvalidAdapter as error:
            raise CommandFailed(f"{shown}: {error}") from None
        except (ValueError, KeyError, TypeError, struct.error):
            raise CommandFailed(f"{shown}: this is no adapter file") from None
        return cls(shown, hashlib.sha256(content).hexdigest(), len(content), spec, tensors)


@dataclass(frozen=True, slots=True)
class Comparison:
    """weights: names of the tensors that both have and that differ."""

    before: Side
    after: Side
    difference: "Difference"
    weights: tuple[str, ...]

    @classmethod
    def of(cls, before: Side, after: Side) -> "Comparison":
        from adapters.difference import difference

        found = difference(before.spec, after.spec, size_before=before.size, size_after=after.size)
        common = before.tensors.keys() & after.tensors.keys()
        weights = (name for name in common if before.tensors[name] != after.tensors[name])
        return cls(before, after, found, tuple(sorted(weights)))

    def lines(self) -> list[str]:
        """For people."""
        heads = [f"{side.shown}: revision {side.revision}" for side in (self.before, self.after)]
        if self.before.revision == self.after.revision:
            return [*heads, "the same file"]
        lines = self.difference.lines()
        if self.weights:
            common = len(self.before.tensors.keys() & self.after.tensors.keys())
            lines.append(f"weights: {len(self.weights)} of {common} tensors have other values")
        return [*heads, *(lines or ["nothing that an adapter is made of differs"])]

    def content(self) -> dict[str, Any]:
        """For programs."""
        sides = {
            name: {"adapter": side.shown, "revision": side.revision, "size": side.size}
            for name, side in (("before", self.before), ("after", self.after))
        }
        return {**sides, "difference": asdict(self.difference), "weights": list(self.weights)}


def side_of(text: str, client: "Client") -> Side:
    """The adapter that a word of the command line names: a file if there is one of this name.

    Raises:
        CommandFailed: a file that cannot be read or is no adapter.
        ClientError: the service does not have it.
    """
    path = Path(text)
    if path.suffix == SUFFIX or path.is_file():
        try:
            return Side.of(text, path.read_bytes())
        except OSError as error:
            raise CommandFailed(f"{text}: cannot be read: {error.strerror or error}") from None
    name, _, revision = text.partition("@")
    return Side.of(text, client.download(name, revision or None).data)


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    """The JSON of a safetensors file, and where its tensors begin.

    Raises:
        ValueError, struct.error: it is none.
    """
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(_MOST_HEADER_BYTES, len(content) - 8):
        raise ValueError("longer than the file")
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no object")
    return header, 8 + length


def _hash(content: bytes, start: int, entry: Mapping[str, Any]) -> str:
    begin, end = entry["data_offsets"]
    kind = f"{entry['dtype']} {entry['shape']} "
    return hashlib.sha256(kind.encode() + content[start + begin : start + end]).hexdigest()
