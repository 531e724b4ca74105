"""Where accuracies come from: the configuration section `accuracy`, and what it asks of the search space.

- `supernet`: one weight-shared network is trained first and scores every architecture (PNAG; the default);
- `training`: every architecture is trained by itself for a few epochs, a proxy of its final accuracy (FNAS);
- `table`: somebody trained them all, as in NAS-Bench-201.

The last two have no shared weights: stage TRAIN has nothing to do, and what is handed over is retrained from scratch
([S4 6.2]) by the recipe of the same section.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from actors.evaluator import TableEvaluator
from searchspaces.errors import ConfigError, DataError, SpaceError
from searchspaces.space import SearchSpace, Tokens


class SupernetAccuracy(BaseModel):
    """Scored with the weights of the shared network; section `supernet` says how that is trained."""

    model_config = ConfigDict(extra="forbid")
    source: Literal["supernet"] = "supernet"


class Recipe(BaseModel):
    """How one architecture is trained by itself, and by how many trainers at once."""

    model_config = ConfigDict(extra="forbid")
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(0.05, gt=0, description="peak of a cosine schedule, SGD with momentum 0.9")
    weight_decay: float = Field(4e-5, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    flip: bool = Field(False, description="random horizontal flips; not for digits or text")
    crop_padding: int = Field(1, ge=0, description="pixels of padding before a random crop")
    workers: int | Literal["auto"] = Field("auto", description="trainers at once; auto: as many as CPUs and GPUs allow")
    cpus: int = Field(1, ge=1, description="threads of each trainer")
    gpus: float = Field(0, ge=0, description="GPUs of each trainer; a fraction shares one")


class TrainingAccuracy(Recipe):
    """Every architecture is trained for `epochs`. `knowledge`: a pool of trained blocks that initialises new models
    (off; own: in the run folder; or the path of a pool that several runs share)."""

    source: Literal["training"] = "training"
    epochs: int = Field(1, ge=1)
    knowledge: str = Field("off", description="off, own, or the path of a pool shared by several runs")


class TableAccuracy(Recipe):
    """A Parquet table with one row per architecture. The recipe trains what is handed over."""

    source: Literal["table"] = "table"
    path: Path = Field(description="Parquet file with one row per architecture")
    token_columns: list[str] = Field(min_length=1, description="columns of the tokens, in the space's order")
    accuracy_column: str = Field(description="column to search by; never the one to report")
    unit: float = Field(0.01, gt=0, description="value of 1 in the accuracy column: 0.01 for per cent")


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"source": value}
    return {"source": "supernet"} | value if isinstance(value, dict) else value


AnyAccuracy = Annotated[
    Annotated[SupernetAccuracy | TrainingAccuracy | TableAccuracy, Field(discriminator="source")],
    BeforeValidator(_named)]


@dataclass(frozen=True, eq=False)
class TableEvaluatorFactory:
    """Builds the evaluator inside a rollout worker; the table travels with it, so workers need no file."""

    tokens_NT: Tokens
    accuracy_N: NDArray[np.float64]

    def __call__(self) -> TableEvaluator:
        return TableEvaluator(self.tokens_NT, self.accuracy_N)


def check_accuracy(settings: SupernetAccuracy | TrainingAccuracy | TableAccuracy, space: SearchSpace) -> None:
    """ConfigError or DataError where this source cannot score architectures of this space."""
    if isinstance(settings, SupernetAccuracy):
        if type(space).make_supernet is SearchSpace.make_supernet:
            raise ConfigError(f"search space {space.space_id} has no supernet, so accuracies cannot come from one; set "
                              "'accuracy' to training (proxy training) or table")
    elif isinstance(settings, TableAccuracy):
        read_table(settings, space)


def read_table(settings: TableAccuracy, space: SearchSpace) -> TableEvaluatorFactory:
    """The table's rows, canonical. DataError for a missing file or column, tokens outside the space, or accuracies
    outside 0..1."""
    if len(settings.token_columns) != len(space.choices):
        raise ConfigError(f"accuracy.token_columns names {len(settings.token_columns)} columns; {space.space_id} has "
                          f"{len(space.choices)} tokens: {', '.join(choice.name for choice in space.choices)}")
    try:
        names = pq.read_schema(settings.path).names
        missing = [name for name in (*settings.token_columns, settings.accuracy_column) if name not in names]
        if missing:
            raise DataError(f"accuracy table {settings.path} has no column '{missing[0]}'; it has {', '.join(names)}")
        table = pq.read_table(settings.path, columns=sorted({*settings.token_columns, settings.accuracy_column}))
        tokens_NT = np.stack([table[name].to_numpy() for name in settings.token_columns], axis=1)
        accuracy_N = table[settings.accuracy_column].to_numpy().astype(np.float64) * settings.unit
        rows_NT = space.canonical(space.check_tokens(tokens_NT))
    except (OSError, pa.ArrowException, ValueError, SpaceError) as error:
        raise DataError(f"accuracy table {settings.path} cannot be used ({str(error).splitlines()[0]}); give a Parquet "
                        "file with one row per architecture") from error
    if not ((accuracy_N >= 0) & (accuracy_N <= 1)).all():
        raise DataError(f"column {settings.accuracy_column} of {settings.path} goes from {accuracy_N.min():.4g} to "
                        f"{accuracy_N.max():.4g} in units of {settings.unit:g}; accuracies are 0..1, correct "
                        "accuracy.unit")
    return TableEvaluatorFactory(rows_NT, accuracy_N)
