"""Settings of NSS. Defaults that are not the paper's have their reason in docs/nss.md; printed values beside."""
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.settings import Frozen

Millions = Annotated[float, Field(gt=0, le=1e9)]


class NssOptions(Frozen):
    """`controller: nss`: how the distributions over spaces are trained beside the supernet's weights."""

    madds_m: tuple[Millions, ...] = Field((), max_length=64, description=(
        "mean multiply-adds wanted of a space, in millions, one space each; none: a space for every budget, by its "
        "mean latency"))
    cost_weight: float = Field(1.0, ge=0, le=1e6, description="lambda, the loss of a mean cost twice the target; not "
                                                              "printed")
    mode: Literal["absolute", "hinge"] = Field("absolute", description="does a cost below the target count too? "
                                                                       "absolute as in the paper")
    learning_rate: float | None = Field(None, gt=0, le=10, description=(
        "Adam's, of the logits; none: 25 over the number of steps of an aim after warm-up, at most 0.5"))
    weight_decay: float = Field(1e-3, ge=0, le=1, description="of the logits")
    first_temperature: float = Field(5.0, gt=0, le=1000, description="of the relaxed draws, falling in equal steps")
    last_temperature: float = Field(0.001, gt=0, le=1000, description="at the last epoch")
    warm_up: float = Field(0.3, ge=0, lt=1, description="share of the epochs in which only weights learn; 15 of 50 "
                                                        "in the paper")
    full: bool = Field(True, description="in warm-up the largest values are trained more often, the more the earlier")
    hard: bool = Field(False, description="draw one member instead of mixtures (straight-through)")
    samples: int = Field(16, ge=1, le=100_000, description="networks that estimate a mean cost without a closed form")
    members: int = Field(1, ge=1, le=1000, description="drawn per step to judge a space by, at the lower quartile of "
                                                       "their losses; 1 as in the paper, its mean member")
    validation: float = Field(0.5, gt=0, lt=1, description="share of the training images that no weight learns from")
    draws: int = Field(5, ge=1, le=1000, description="spaces drawn at the end; the one nearest to the target is "
                                                     "kept")
    outside: float = Field(0.25, ge=0, lt=1, description="share of the evaluations that go to networks of the whole "
                                                         "space, to compare with")
