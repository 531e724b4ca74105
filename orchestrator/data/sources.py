"""Can the configured source of accuracies score this space? And the table that may be that source."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.evaluator import TableEvaluator
from actors.knowledge.pool import check_folder
from orchestrator.data.accuracy import SupernetAccuracy, TableAccuracy, TrainingAccuracy
from searchspaces.errors import ConfigError, DataError, SpaceError
from searchspaces.space import SearchSpace, Tokens


@dataclass(frozen=True, eq=False)
class TableEvaluatorFactory:
    """Builds the evaluator inside a rollout worker; the table travels with it, so workers need no file."""

    tokens_NT: Tokens
    accuracy_N: NDArray[np.float64]

    def __call__(self) -> TableEvaluator:
        return TableEvaluator(self.tokens_NT, self.accuracy_N)


def check_accuracy(settings: SupernetAccuracy | TrainingAccuracy | TableAccuracy, space: SearchSpace) -> None:
    """ConfigError, DataError or StoreError where this source cannot score architectures of this space."""
    if isinstance(settings, SupernetAccuracy):
        if type(space).make_supernet is SearchSpace.make_supernet:
            raise ConfigError(f"search space {space.space_id} has no supernet, so accuracies cannot come from one; set "
                              "'accuracy' to training (proxy training) or table")
    elif isinstance(settings, TableAccuracy):
        for column in {settings.accuracy_column, settings.test_column or settings.accuracy_column}:
            read_table(settings, space, column)
    elif settings.knowledge not in ("off", "own"):
        check_folder(Path(settings.knowledge).expanduser(), space)


def looked_up(settings: TableAccuracy, space: SearchSpace, tokens_NT: Tokens, column: str) -> list[float | None]:
    """What the table's column says of these architectures, 0..1; None where it has no row."""
    evaluations = read_table(settings, space, column)().evaluate(space.canonical(tokens_NT))
    return [None if evaluation.error else evaluation.accuracy for evaluation in evaluations]


def read_table(settings: TableAccuracy, space: SearchSpace, column: str = "") -> TableEvaluatorFactory:
    """The table's rows, canonical, with what `column` says (the one to search by, if none). DataError for a missing
    file or column, tokens outside the space, or accuracies outside 0..1."""
    column = column or settings.accuracy_column
    if len(settings.token_columns) != len(space.choices):
        raise ConfigError(f"accuracy.token_columns names {len(settings.token_columns)} columns; {space.space_id} has "
                          f"{len(space.choices)} tokens: {', '.join(choice.name for choice in space.choices)}")
    try:
        names = pq.read_schema(settings.path).names
        missing = [name for name in (*settings.token_columns, column) if name not in names]
        if missing:
            raise DataError(f"accuracy table {settings.path} has no column '{missing[0]}'; it has {', '.join(names)}")
        table = pq.read_table(settings.path, columns=sorted({*settings.token_columns, column}))
        tokens_NT = np.stack([table[name].to_numpy() for name in settings.token_columns], axis=1)
        accuracy_N = table[column].to_numpy().astype(np.float64) * settings.unit
        rows_NT = space.canonical(space.check_tokens(tokens_NT))
    except (OSError, pa.ArrowException, ValueError, SpaceError) as error:
        raise DataError(f"accuracy table {settings.path} cannot be used ({str(error).splitlines()[0]}); give a Parquet "
                        "file with one row per architecture") from error
    if not ((accuracy_N >= 0) & (accuracy_N <= 1)).all():
        raise DataError(f"column {column} of {settings.path} goes from {accuracy_N.min():.4g} to "
                        f"{accuracy_N.max():.4g} in units of {settings.unit:g}; accuracies are 0..1, correct "
                        "accuracy.unit")
    return TableEvaluatorFactory(rows_NT, accuracy_N)
