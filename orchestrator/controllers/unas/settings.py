"""Settings of UNAS. Defaults that are not the paper's have their reason in docs/unas.md; printed values beside."""
from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.prediction.posterior import PosteriorSettings
from orchestrator.settings import Frozen


class LatencyOptions(Frozen):
    """The latency loss: a share of the budget, so that one weight fits every device."""

    mode: Literal["hinge", "linear"] = Field("hinge", description="what exceeds the budget, or all of the latency")
    weight: float = Field(2.0, ge=0, le=1e6, description="loss of a latency one budget too long; 0: latency is ignored")
    ramp: float = Field(0.25, ge=0, le=1, description="share of the search in which the weight rises from 0")
    samples: int = Field(48, ge=1, le=100_000, description="latencies measured per epoch, of all budgets together")
    networks: int = Field(60, ge=2, le=100_000, description="uniform networks that the surrogate is first fitted on; "
                                                            "8,000 in the public code")


class BlackBoxOptions(Frozen):
    """Where accuracies come from a table or from training: distributions that follow the observed trials."""

    warm_up: int = Field(20, ge=4, le=1_000_000, description="uniform architectures before the distributions follow")
    batch: int = Field(8, ge=1, le=1_000_000, description="trials between two rounds of learning")
    steps: int = Field(60, ge=1, le=1_000_000, description="of every distribution, in every round")
    draws: int = Field(16, ge=1, le=100_000, description="samples of every distribution in a step")
    learning_rate: float = Field(0.15, gt=0, le=10, description="Adam's, of the logits")
    temperature: float = Field(0.4, gt=0, le=100, description="of the relaxed samples")
    over: float = Field(1.0, ge=0, le=1e6, description="loss of a latency just over the budget, in standard deviations "
                                                       "of the accuracies")
    slope: float = Field(10.0, ge=0, le=1e6, description="further loss of a latency one budget too long")
    posterior: PosteriorSettings = Field(PosteriorSettings(trees=30), description="what is believed of accuracies")


class UnasOptions(Frozen):
    """`controller: unas`: how the distributions are trained beside the supernet's weights."""

    temperature: float = Field(0.4, gt=0, le=100, description="of the relaxed samples; 0.4 as printed")
    learning_rate: float = Field(0.03, gt=0, le=10, description="Adam's, of the logits; 0.001 in the public code, for "
                                                                "ten times as many steps")
    estimator: Literal["rebar", "gumbel_softmax", "reinforce"] = Field(
        "rebar", description="gumbel_softmax is biased, reinforce noisy; for comparison")
    objective: Literal["generalisation", "validation", "training"] = Field(
        "generalisation", description="loss of an architecture; generalisation: training loss and its gap")
    generalisation: float = Field(0.5, ge=0, le=1e6, description="lambda, the weight of the gap")
    gap: Literal["batch", "per_example"] = Field("batch", description="per_example as in the public code")
    softening: float = Field(0.0, ge=0, le=1, description="keeps every choice this likely, about")
    duplicates: float = Field(0.2, ge=0, le=1e6, description="penalty for what a space wants avoided (darts: one edge "
                                                             "twice)")
    weights_at: Literal["relaxed", "hard"] = Field("relaxed", description="where the shared weights learn: at the "
                                                                          "mixture, or at the sampled subnet")
    warm_up: float = Field(0.3, ge=0, lt=1, description="share of the epochs in which only weights learn")
    validation: float = Field(0.2, gt=0, lt=1, description="share of the training images that no weight learns from")
    architectures: int | Literal["auto"] = Field("auto", description="sampled per step, each for a part of the batch; "
                                                                     "auto: one per part of supernet.parts")
    latency: LatencyOptions = LatencyOptions()
    black_box: BlackBoxOptions = BlackBoxOptions()
