"""Architectures as data for a drawing: one row of blocks each, aligned so that two can be compared by eye.

    slots          every block position of the space, in network order: {name, stage}
    blocks         distinct blocks, each stored once: {label, detail, height, width, parts}
    architectures  arch_id -> one index into `blocks` per slot, -1 where the layer is skipped (a gap in the picture)
    hint           how to read the picture

`height` and `width` are in 0..1: height by kernel, width by expansion or channels (blocks without are narrow). `parts`
are the colour categories of a block from top to bottom: one per operation of a cell; else its `op`, or its kernel where
all blocks are of one kind, once per layer.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from searchspaces.graph import Block, Graph
from searchspaces.space import SearchSpace, Tokens

NARROW = 0.45


def drawing_data(space: SearchSpace, rows: Mapping[str, Tokens]) -> dict[str, Any]:
    """Drawing of every architecture in `rows` (arch_id -> int8[T]). SpaceError where a row is not of this space."""
    if not rows:
        return {"slots": [], "blocks": [], "architectures": {}, "hint": ""}
    tokens_NT = space.canonical(space.check_tokens(np.stack(list(rows.values()))))
    graphs = {arch_id: space.graph(tokens) for arch_id, tokens in zip(rows, tokens_NT)}
    # The extremes add the positions that none of the given architectures uses, so that their gaps show too.
    everything = [*graphs.values(), *(space.graph(tokens) for tokens in space.canonical(space.extremes()))]
    slots = _slots(everything)
    scale = (_largest(everything, "kernel"), _largest(everything, "expand", "width"))
    index: dict[Any, int] = {}
    blocks: list[dict[str, Any]] = []
    architectures: dict[str, list[int]] = {}
    for arch_id, graph in graphs.items():
        row = dict.fromkeys(slots, -1)
        for block in graph.blocks:
            key = (block.label, tuple(block.settings.items()), block.madds, block.params, block.out_shape)
            if key not in index:
                index[key] = len(blocks)
                blocks.append(_describe(block, *scale))
            row[block.name] = index[key]
        architectures[arch_id] = list(row.values())
    return {"slots": [{"name": name, "stage": stage} for name, stage in slots.items()], "blocks": blocks,
            "architectures": architectures, "hint": _hint(graphs.values())}


def _hint(graphs: Iterable[Graph]) -> str:
    blocks = [block for graph in graphs for block in graph.blocks]
    if any(_is_cell(block) for block in blocks):
        return "A cell shows its operations from top to bottom."
    layers = " Bands: its layers." if any("layers" in block.settings for block in blocks) else ""
    width = "channels" if any("width" in block.settings for block in blocks) else "expansion"
    return f"Height: kernel size. Width: {width}." + layers


def _is_cell(block: Block) -> bool:
    """Has operations instead of a kernel."""
    return "kernel" not in block.settings and any(isinstance(value, str) for value in block.settings.values())


def _slots(graphs: Sequence[Graph]) -> dict[str, int]:
    """Block name -> stage over all graphs, each unknown name placed after the one it follows in its own graph."""
    names: list[str] = []
    stages: dict[str, int] = {}
    for graph in graphs:
        at = 0
        for block in graph.blocks:
            if block.name in stages:
                at = names.index(block.name) + 1
                continue
            names.insert(at, block.name)
            stages[block.name] = block.stage
            at += 1
    return {name: stages[name] for name in names}


def _largest(graphs: Sequence[Graph], *settings: str) -> float:
    return max((float(b.settings[setting]) for g in graphs for b in g.blocks for setting in settings
                if setting in b.settings), default=1.0)


def _describe(block: Block, largest_kernel: float, largest_expand: float) -> dict[str, Any]:
    kernel, expand = block.settings.get("kernel"), block.settings.get("expand", block.settings.get("width"))
    if _is_cell(block):
        height, width = 1.0, 1.0
        parts = [value for value in block.settings.values() if isinstance(value, str)]
    else:
        height = 0.25 + 0.75 * (float(kernel) / largest_kernel if kernel else 0.0)
        width = NARROW if expand is None else 0.25 + 0.75 * float(expand) / largest_expand
        parts = [str(block.settings.get("op", f"kernel {kernel}" if kernel else "other"))]
        parts *= int(block.settings.get("layers", 1))
    settings = [f"{name} {_value(value)}" for name, value in block.settings.items()]
    shape = "×".join(str(size) for size in block.out_shape)
    detail = [*settings, f"output {shape}", f"{block.madds / 1e6:.3g}M multiply-adds", f"{block.params:,} parameters"]
    return {"label": block.label, "detail": ", ".join(detail), "height": round(height, 3), "width": round(width, 3),
            "parts": parts}


def _value(value: int | float | str | bool) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
