"""Which Parquet parts of a table count, and when its writer merges them.

A part is called `part-<number of its first row>.parquet`. Slow evaluations make thousands of parts of a few rows, and
opening a file costs more than reading it; so a writer merges its newest parts now and then. The merged part replaces
the first of them in one rename, and only then the others are removed. A part that begins before the end of the one in
front of it is therefore contained in that one and not read: at every moment, also at one where a writer was killed,
each row is there once.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from actors.objectpath import AnyPath, matching
from actors.threads import in_threads
from searchspaces.errors import StoreError

MOST_SMALL = 128        # parts at the end of a table before they are merged
FULL_ROWS = 10_000      # a part with so many rows is never merged again
ATTEMPTS = 20           # to read parts that a writer is merging: it does so every MOST_SMALL parts

AT_ONCE = 16            # requests to an object store, each of which takes its time

Part = tuple[AnyPath, pa.Table]


def first_row(part: AnyPath) -> int:
    return int(part.name.split("-")[1].split(".")[0])


def listed(folder: AnyPath) -> list[AnyPath]:
    """In order of their rows, merged ones and what is contained in them."""
    return matching(folder, "part-*.parquet")


def read_in_order(folder: AnyPath, read: Callable[[AnyPath], pa.Table | None]) -> tuple[list[Part], list[AnyPath]]:
    """The parts that count, and those that are contained in them. `read` gives all rows of a part, of any columns, or
    None for one to be left out; it raises FileNotFoundError where the part is gone. Safe beside a writer."""
    for _ in range(ATTEMPTS):
        try:
            paths = listed(folder)
            if isinstance(folder, Path):
                return _in_order(paths, read)
            return _in_order(paths, dict(zip(paths, in_threads(read, paths, AT_ONCE), strict=True)).__getitem__)
        except FileNotFoundError:   # merged since it was listed
            continue
    raise StoreError(f"the parts in {folder} change faster than they can be read; try again")


def _in_order(paths: Sequence[AnyPath],
              read: Callable[[AnyPath], pa.Table | None]) -> tuple[list[Part], list[AnyPath]]:
    found: list[Part] = []
    contained: list[AnyPath] = []
    end = 0
    for path in paths:
        if first_row(path) < end:
            contained.append(path)
        elif (table := read(path)) is not None:
            found.append((path, table))
            end = first_row(path) + table.num_rows
    return found, contained


def mergeable(parts: Sequence[Part]) -> list[Part]:
    """The small parts at the end, without a gap between them (where one was damaged)."""
    start = len(parts)
    while start > 0:
        path, table = parts[start - 1]
        meets = start == len(parts) or first_row(path) + table.num_rows == first_row(parts[start][0])
        if table.num_rows >= FULL_ROWS or not meets:
            break
        start -= 1
    return list(parts[start:])


def groups(small: Sequence[Part]) -> list[list[Part]]:
    """Neighbours that become one part each: full ones, but for the last."""
    found: list[list[Part]] = []
    room = 0
    for part in small:
        if room <= 0:
            found.append([])
            room = FULL_ROWS
        found[-1].append(part)
        room -= part[1].num_rows
    return found


def with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """With the schema's columns, null where the table has none, in its order."""
    for field in (field for field in schema if field.name not in table.column_names):
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)
