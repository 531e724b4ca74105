"""Append-only tables in Parquet parts. A damaged part is set aside as `*.damaged` with a warning; the rest is kept."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.objectpath import AnyPath, parquet_source
from actors.objectstore import ObjectStoreError
from actors.wholefile import set_aside
from orchestrator.record import parts
from orchestrator.record.files import write_atomically
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)
# Columns of trials that runs of earlier versions lack; they read as null.
ADDED = frozenset({"details", "latencies", "proposed_for"})


class PartFolder:
    """Append-only table of Parquet parts `part-<first row number>.parquet`, rows in order of appending.

    One writer at a time. `append` returns after the rows are on disk; now and then it merges parts, which readers need
    not know (parts.py). Opening it checks every part once. `check` is called before writing and may raise.
    """

    def __init__(self, folder: AnyPath, schema: pa.Schema, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.schema = schema
        self._check = check
        folder.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self.damaged: list[str] = []
        self._seen = parts.listed(self.folder)
        found, self._contained = parts.read_in_order(self.folder, self._intact)
        self._small = parts.mergeable(found)    # as they are on disk
        self.rows = max((parts.first_row(part) + table.num_rows for part, table in found), default=0)
        lost = [parts.first_row(path) + 1 for path in self.folder.glob("*.damaged")]
        self.rows = max([self.rows, *lost])

    def begin_writing(self) -> None:
        """By the one writer: takes in what another wrote since this was opened, and removes what a killed one left. A
        reader would take a living one's."""
        if self._seen != parts.listed(self.folder):
            self._open()
        for leftover in [*self.folder.glob(".*.part"), *self._contained]:
            leftover.unlink(missing_ok=True)
        if len(self._small) > parts.MOST_SMALL:     # of an earlier version, which merged nothing
            self._merge()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows as one new part; an empty sequence writes nothing."""
        if not rows:
            return
        self._check()
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)
        part = self._write(self.rows, table)
        self.rows += len(rows)
        self._small = parts.mergeable([*self._small, (part, table)])
        if len(self._small) > parts.MOST_SMALL:
            self._merge()

    def _write(self, first: int, table: pa.Table) -> AnyPath:
        part = self.folder / f"part-{first:09d}.parquet"
        with write_atomically(part) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        return part

    def _merge(self) -> None:
        """Nothing is lost where this fails, and nothing has to be said: the next part will not be written either."""
        small, self._small = self._small, []
        with contextlib.suppress(StoreError, OSError):
            for group in parts.groups(small):
                whole = pa.concat_tables([table for _, table in group])
                part = self._write(parts.first_row(group[0][0]), whole)
                for contained, _ in group[1:]:
                    contained.unlink(missing_ok=True)
            self._small = parts.mergeable([(part, whole)])

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows in order."""
        def read(part: AnyPath) -> pa.Table:
            return pq.read_table(parquet_source(part), columns=columns, schema=self.schema)

        found, _ = parts.read_in_order(self.folder, read)
        schema = self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        return pa.concat_tables([schema.empty_table(), *(table for _, table in found)])

    def _intact(self, part: AnyPath) -> pa.Table | None:
        """Its rows; None where it is damaged, and set aside."""
        try:
            file = pq.ParquetFile(parquet_source(part), page_checksum_verification=True)
            table = file.read(use_threads=False)    # quick if small
            known = [field for field in self.schema if field.name in table.schema.names or field.name not in ADDED]
            if not table.schema.equals(pa.schema(known)):
                raise pa.ArrowInvalid(f"its columns are {table.schema.names}")
        except (FileNotFoundError, ObjectStoreError):
            raise       # says nothing about the part
        except (OSError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s); it is set aside as %s.damaged and the rest is kept",
                        part, str(error).split("\n")[0], part.name)
            set_aside(part)
            self.damaged.append(part.name)
            return None
        return parts.with_columns(table, self.schema)


def read_parts(folder: AnyPath, schema: pa.Schema) -> pa.Table:
    """All rows of another run's table, which may be growing: nothing is changed, what cannot be read is left out."""
    def readable(part: AnyPath) -> pa.Table | None:
        try:
            return pq.read_table(parquet_source(part), schema=schema, page_checksum_verification=True)
        except (FileNotFoundError, ObjectStoreError):
            raise
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read (%s); its rows are left out", part, str(error).split("\n")[0])
            return None

    found, _ = parts.read_in_order(folder, readable)
    return pa.concat_tables([schema.empty_table(), *(table for _, table in found)])
