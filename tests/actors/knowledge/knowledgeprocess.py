"""Architectures and made-up weights that tell who wrote them, and what the processes of test_knowledge_store.py do.

    python -m tests.actors.knowledge.knowledgeprocess MODE FOLDER SEED COUNT
"""
from __future__ import annotations

import resource
import sys

import numpy as np
from numpy.typing import NDArray

from actors.knowledge.pool import KnowledgePool, Start
from searchspaces.graph import Graph, tensor_shapes
from searchspaces.mnas.space import MnasS16

SPACE = MnasS16()
EPOCHS = 4
QUERIES = 7     # searched blocks of an architecture
Row = NDArray[np.int8]
Weights = dict[str, NDArray[np.generic]]
# mb3, 3x3, no SE, no skip, filters 1.0, base layers everywhere: all tokens live and changeable
BASE: Row = SPACE.canonical(np.array([[2, 0, 0, 0, 1, 1]] * QUERIES, dtype=np.int8).reshape(1, -1))[0]


def rows(count: int, seed: int = 0) -> Row:
    return SPACE.sample_uniform(np.random.default_rng(seed), count)


def other(row: Row, *changes: tuple[int, int]) -> Row:
    """The row with token `kind` of `block` changed, for each (block, kind)."""
    result = row.copy()
    for block, kind in changes:
        result[6 * block + kind] = (result[6 * block + kind] + 1) % 2
    return result


def marked(graph: Graph, mark: float) -> Weights:
    """Every number is `mark`: two writers in one entry would show."""
    shapes = {node.name: node.shape for node in graph.nodes}
    return {f"{node.name}.{suffix}": np.full(shape, mark, dtype=np.float32) for node in graph.nodes[1:]
            for suffix, shape in tensor_shapes(node, shapes[node.inputs[0]]).items()}


def insert(pool: KnowledgePool, row: Row, mark: int, lineage: int | None = None) -> bool:
    graph = SPACE.graph(row)
    return pool.insert(row, marked(graph, mark), 10, [mark if lineage is None else lineage] * len(graph.blocks))


def check_marks(start: Start) -> int:
    """How many sources there are; each must come from one writer, whole."""
    for source in filter(None, start.sources):
        marks = {float(value) for array in source.weights.values() for value in np.unique(array)}
        assert marks == {float(source.lineage)}, f"lineage {source.lineage} holds the values {sorted(marks)}"
    return sum(source is not None for source in start.sources)


def main(mode: str, folder: str, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rows(count, seed)
    maximum_mb = 0.6 if mode == "crowd" else 100.0
    pool = KnowledgePool(folder, SPACE, EPOCHS, maximum_mb)
    if mode == "full":      # as a disk that takes no more: every write beyond 20 kB fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    found = 0
    for index, row in enumerate(tokens):
        print("stored" if insert(pool, row, 1000 * seed + index) else "skipped", flush=True)
        if mode == "crowd":
            found += check_marks(pool.start(tokens[rng.integers(index + 1)], active=True))
    print(f"found={found}", *(f"{name}={value:g}" for name, value in pool.statistics().items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
