"""One entry of the knowledge pool: a trained block as a safetensors file, and its row in the Parquet index.

The facts of the row are in the file too, as its metadata, and the start of its digest in its name, so that a lost index
can be made again from the entries.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load, save

from actors.objectpath import AnyPath
from actors.wholefile import write_whole

SCHEMA = pa.schema([
    ("stage", pa.int64()), ("kind", pa.string()), ("key", pa.list_(pa.int64())), ("file", pa.string()),
    ("sha256", pa.string()), ("size_bytes", pa.int64()), ("lineage", pa.int64()), ("iterations", pa.int64()),
    ("written_ns", pa.int64()),
])
DIGITS = 16             # of the digest in file names
BlockId = tuple[int, str, tuple[int, ...]]     # stage, kind, key


class DamagedError(Exception):
    """A file is there and is not what was written."""


@dataclass(frozen=True)
class Entry:
    """One row of the index. `kind` names blocks without choices (stem, head), which have no key; else it is "".

    `lineage`: training iterations along the chain of warm starts, the last `iterations` of them in this network.
    """

    stage: int
    kind: str
    key: tuple[int, ...]
    file: str
    sha256: str
    size_bytes: int
    lineage: int
    iterations: int
    written_ns: int

    @property
    def block(self) -> BlockId:
        return self.stage, self.kind, self.key

    def weights(self, folder: AnyPath) -> dict[str, NDArray[np.generic]]:
        """The tensors, by their names within the block. OSError if the file cannot be read, DamagedError."""
        content = (folder / self.file).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DamagedError("its content does not have the digest that was written")
        return load(content)

    @staticmethod
    def of_file(path: AnyPath) -> Entry:
        """The row from the file alone. OSError if it cannot be read, DamagedError."""
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if not path.stem.endswith(sha256[:DIGITS]):
            raise DamagedError("its content does not have the digest of its name")
        try:
            facts = json.loads(_metadata(content)["entry"])
            facts |= {"key": tuple(facts["key"]), "file": path.name, "size_bytes": len(content), "sha256": sha256}
            return Entry(**{field.name: facts[field.name] for field in fields(Entry)})
        except (ValueError, LookupError, TypeError) as error:
            raise DamagedError(str(error)) from error


@dataclass(frozen=True, eq=False)
class NewEntry:
    """A block to be stored; its channels are sorted (searchspaces/trained/blockweights.py)."""

    block: BlockId
    weights: Mapping[str, NDArray[np.generic]]
    lineage: int
    iterations: int

    def packed(self, written_ns: int) -> tuple[Entry, bytes]:
        """The row and the file's content."""
        stage, kind, key = self.block
        facts = {"stage": stage, "kind": kind, "key": key, "lineage": self.lineage, "iterations": self.iterations,
                 "written_ns": written_ns}
        content = save({name: np.ascontiguousarray(array) for name, array in self.weights.items()},
                       {"entry": json.dumps(facts)})
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{stage}-{kind or '.'.join(map(str, key))}-{written_ns:x}-{sha256[:DIGITS]}.safetensors"
        return Entry(stage, kind, key, file, sha256, len(content), self.lineage, self.iterations, written_ns), content


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file: eight bytes say how long the JSON behind them is."""
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8:8 + length])["__metadata__"])


def newest(entries: Iterable[Entry]) -> dict[BlockId, Entry]:
    """The last written entry of every block."""
    found: dict[BlockId, Entry] = {}
    for entry in entries:
        if entry.block not in found or found[entry.block].written_ns < entry.written_ns:
            found[entry.block] = entry
    return found


def write_index(path: AnyPath, rows: Sequence[Entry]) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), buffer, write_page_checksum=True)
    write_whole(path, buffer.getvalue().to_pybytes())


def read_index(path: AnyPath) -> list[Entry]:
    """OSError if the file cannot be read, DamagedError."""
    content = path.read_bytes()
    try:
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True).read(SCHEMA.names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DamagedError(str(error)) from error
    return [Entry(**{**row, "key": tuple(row["key"])}) for row in table.to_pylist()]
