"""Where accuracies come from: the configuration section `accuracy`.

- `supernet`: one weight-shared network is trained first and scores every architecture (PNAG; the default);
- `training`: every architecture is trained by itself for a few epochs, a proxy of its final accuracy (FNAS);
- `table`: somebody trained them all, as in NAS-Bench-201.

The last two have no shared weights: stage TRAIN has nothing to do, and what is handed over is retrained from scratch
([S4 6.2]) by the recipe of the same section.
"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from actors.data import Augmentation
from orchestrator.settings import Section

Gpus = Annotated[float, Field(ge=0, le=64)] | Literal["auto"]  # of one worker; auto: orchestrator/resources/gpus.py


class Augmented(Section):
    """What is done to training images at random."""

    flip: bool = Field(False, description="random horizontal flips; not for digits or text")
    crop_padding: int = Field(1, ge=0, le=512, description="pixels of padding before a random crop")
    colour: float = Field(0.0, ge=0, lt=1, description="largest random change of brightness, contrast and saturation, "
                                                       "as a share")
    mixup: float = Field(0.0, ge=0, le=100, description="a of Beta(a, a), the share in which two images are blended; "
                                                        "0: never")
    cutmix: float = Field(0.0, ge=0, le=100, description="a of Beta(a, a), the share in which a rectangle comes from "
                                                         "another image; 0: never")

    def augmentation(self) -> Augmentation:
        return Augmentation(padding=self.crop_padding, flip=self.flip, colour=self.colour, mixup=self.mixup,
                            cutmix=self.cutmix)


class SupernetAccuracy(Section):
    """Scored with the weights of the shared network; section `supernet` says how that is trained."""

    source: Literal["supernet"] = Field("supernet", description="supernet, training or table")


class Recipe(Augmented):
    """How one architecture is trained by itself, and by how many trainers at once."""

    batch_size: int = Field(64, ge=2, le=65_536, description="images of one step")
    learning_rate: float = Field(0.05, gt=0, le=100, description="peak of a cosine schedule, SGD with momentum 0.9")
    weight_decay: float = Field(4e-5, ge=0, le=1, description="L2 penalty of the weights")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of a label that is spread over all classes")
    workers: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field("auto", description=(
        "trainers at once; auto: as many as CPUs and GPUs allow"))
    cpus: int = Field(1, ge=1, le=1024, description="threads of each trainer")
    gpus: Gpus = Field("auto", description="GPUs of each trainer; a fraction shares one; auto: what there is")


class TrainingAccuracy(Recipe):
    """Every architecture is trained for `epochs`. `knowledge`: a pool of trained blocks that initialises new models
    (off; own: in the run folder; or the path of a pool that several runs share). Models start cold until
    `knowledge_hits` of the last `knowledge_window` blocks asked for had a close enough match there."""

    source: Literal["training"] = Field("training", description="supernet, training or table")
    epochs: int = Field(1, ge=1, le=100_000, description="passes over the training images, per architecture")
    knowledge: str = Field("off", description="off, own, or the path of a pool shared by several runs")
    knowledge_mb: float = Field(2000, gt=0, le=1e9, description="the pool's largest size on disk; its oldest blocks go")
    knowledge_window: int = Field(200, ge=1, le=1_000_000, description=(
        "blocks asked for last that decide whether the pool is used"))
    knowledge_hits: float = Field(0.99, gt=0, le=1, description="share of them that must have a close match; 0.99 as "
                                                                "printed")


class TableAccuracy(Recipe):
    """A Parquet table with one row per architecture. The recipe trains what is handed over; where nothing can be, as no
    file can be timed, `test_column` says what the chosen architectures reached."""

    source: Literal["table"] = Field("table", description="supernet, training or table")
    path: Path = Field(description="Parquet file with one row per architecture")
    token_columns: list[str] = Field(min_length=1, description="columns of the tokens, in the space's order")
    accuracy_column: str = Field(description="column to search by; never the one to report")
    test_column: str | None = Field(None, description="column to report, where a run ends with architectures that "
                                                      "nobody trains; none: their test accuracy is not known")
    unit: float = Field(0.01, gt=0, description="value of 1 in these columns: 0.01 for per cent")


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"source": value}
    return {"source": "supernet"} | value if isinstance(value, dict) else value


AnyAccuracy = Annotated[
    Annotated[SupernetAccuracy | TrainingAccuracy | TableAccuracy, Field(discriminator="source")],
    BeforeValidator(_named)]
