"""Search quality on a table of all NAS-Bench-201 cells: one run of the product's own controller.

    python -m tests.benchmarks.nasbench201 --table T --accuracy COLUMN --latency COLUMN --evaluations N --seed S
        --budgets FILE --trace OUT.jsonl --generated OUT.json [--controller NAME]

T (Parquet) needs `arch_index`, the six `op_*` columns and the two named columns. FILE is a JSON list of budgets in ms.
The trace has one line `{"arch_index": i}` per distinct cell whose accuracy or latency was looked up, in order; the
generated file maps every budget, as it is printed in FILE, to the chosen arch_index or null. Only cells of the trace
are chosen, so that the latency of an answer is known to be at or under its budget.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Answer, EarlierRun, Observation, Task
from searchspaces.errors import ConfigError, DataError, ParetorayError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import SearchSpace, Tokens

OP_COLUMNS = ("op_01", "op_02", "op_12", "op_03", "op_13", "op_23")
STEP = 8  # cells looked up between two calls of the controller


@dataclass(frozen=True)
class Table:
    """Row-aligned columns; accuracy in the table's own unit (per cent)."""

    arch_index: NDArray[np.int64]
    tokens_NT: Tokens
    accuracy: NDArray[np.float64]
    latency_ms: NDArray[np.float64]

    @classmethod
    def read(cls, path: str, accuracy: str, latency: str) -> Table:
        names = ["arch_index", *OP_COLUMNS, accuracy, latency]
        try:
            columns = pyarrow.parquet.read_table(path, columns=names)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"cannot read the table {path} ({str(error).splitlines()[0]})") from error
        missing = [name for name in names if name not in columns.column_names]
        if missing:
            raise DataError(f"table {path} has no column '{missing[0]}'; it needs {', '.join(names)}")
        tokens_NT = np.stack([columns[name].to_numpy() for name in OP_COLUMNS], axis=1).astype(np.int8)
        return cls(columns["arch_index"].to_numpy().astype(np.int64), tokens_NT,
                   columns[accuracy].to_numpy().astype(np.float64), columns[latency].to_numpy().astype(np.float64))


@dataclass(frozen=True)
class Run:
    """Rows looked up, in order, and the chosen row (or None) per budget."""

    looked_up: list[int]
    chosen: list[int | None]


def search(table: Table, budgets_ms: Sequence[float], evaluations: int, seed: int, controller_name: str,
           space: SearchSpace | None = None, known: Sequence[int] = (), earlier: Sequence[EarlierRun] = (),
           options: Mapping[str, Any] | None = None) -> Run:
    """One run against the table as target and as evaluator; every look-up gives accuracy and latency. `space`: one with
    the table's tokens, where that is not all of NAS-Bench-201; `known`: rows looked up before, at no further cost;
    `earlier`: runs of `warm_start`; `options`: the controller's."""
    if not budgets_ms or min(budgets_ms) <= 0:
        raise ConfigError(f"budgets are {list(budgets_ms)}; give at least one positive number of ms")
    evaluations = min(evaluations, len(table.arch_index) - len(known))
    row_of = {tokens.tobytes(): row for row, tokens in enumerate(table.tokens_NT)}
    task = Task(tuple(budgets_ms), evaluations + len(known), seed, earlier=tuple(earlier))
    controller = make_controller(controller_name, space or NasBench201(), task, options or {})
    looked_up: list[int] = []
    controller.observe([observation(table, row) for row in known])
    while len(looked_up) < evaluations:
        proposals = controller.propose(min(STEP, evaluations - len(looked_up)))
        if not proposals:
            break
        rows = [row_of[proposal.tokens.tobytes()] for proposal in proposals]
        looked_up += rows
        controller.observe([observation(table, row) for row in rows])
    answers = controller.generate(budgets_ms, alternatives=evaluations + len(known))
    return Run(looked_up, [_choice(alternatives, row_of) for alternatives in answers])


def observation(table: Table, row: int) -> Observation:
    return Observation(table.tokens_NT[row], float(table.accuracy[row]) / 100, float(table.latency_ms[row]))


def _choice(options: Sequence[Answer], row_of: dict[bytes, int]) -> int | None:
    """The best answer that was looked up, because only then its latency is known."""
    met = [a for a in options if a.observed and a.feasible and a.latency_ms <= a.budget_ms]
    return row_of[met[0].tokens.tobytes()] if met else None


def read_budgets(path: Path) -> dict[str, float]:
    """Budgets in ms by their text in the file (1.50 stays "1.50")."""
    try:
        texts = json.loads(path.read_text(), parse_float=str, parse_int=str)
        return {str(text): float(text) for text in texts}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot read budgets from {path} ({error}); give a JSON list of ms") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True)
    parser.add_argument("--accuracy", required=True, metavar="COLUMN", help="what the search sees")
    parser.add_argument("--latency", required=True, metavar="COLUMN")
    parser.add_argument("--evaluations", required=True, type=int, metavar="N")
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--budgets", required=True, type=Path, metavar="FILE", help="JSON list of budgets in ms")
    parser.add_argument("--trace", required=True, type=Path, metavar="OUT.jsonl")
    parser.add_argument("--generated", required=True, type=Path, metavar="OUT.json")
    parser.add_argument("--controller", default="pnag", help="a shipped name or module:Class")
    options = parser.parse_args(arguments)
    try:
        if options.evaluations < 1:
            raise ConfigError(f"--evaluations is {options.evaluations}; it must be at least 1")
        table = Table.read(options.table, options.accuracy, options.latency)
        budgets = read_budgets(options.budgets)
        run = search(table, list(budgets.values()), options.evaluations, options.seed, options.controller)
    except ParetorayError as error:
        sys.exit(f"error: {error}")
    options.trace.write_text("".join(json.dumps({"arch_index": int(table.arch_index[row])}) + "\n"
                                     for row in run.looked_up))
    chosen = {text: None if row is None else int(table.arch_index[row]) for text, row in zip(budgets, run.chosen)}
    options.generated.write_text(json.dumps(chosen, indent=1))


if __name__ == "__main__":
    main()
