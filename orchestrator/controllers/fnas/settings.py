"""Settings of FNAS. Where the paper is silent or unsound the default is ours; `printed` values are named beside it."""
from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.controllers.fnas.critic import Form as CriticForm
from orchestrator.controllers.fnas.experience import Eviction
from orchestrator.settings import Frozen

Form = Literal["soft", "hard", "accuracy"]      # of the reward


class RewardSettings(Frozen):
    """R = ACC * (LAT / T)^w (Eq. 2, after MnasNet): soft w = -0.07; hard w = 0 under the target and -1 above."""

    form: Form | None = Field(None, description=(
        "what LAT above T costs; accuracy: nothing; none: soft for one target, hard where every budget is one"))
    cost: Literal["latency", "madds"] = Field("latency", description="what LAT is: latency in ms, or multiply-adds")
    target: float | None = Field(None, gt=0, description=(
        "T, in ms or multiply-adds; none: every budget, or the largest where the critic predicts the reward"))
    floor: float = Field(0.5, ge=0, description="LAT / T counts as at least this, or models of almost no cost win")


class CriticSettings(Frozen):
    """Uncertainty-aware critic (section 4): which samples need no training."""

    use: bool = Field(True, description="false: every sample is trained")
    form: CriticForm = Field("ensemble", description="printed: V and a second network U that learns its errors")
    predicts: Literal["reward", "accuracy"] | None = Field(None, description=(
        "what V learns: the reward of one target, as printed, or the accuracy, from which with a latency model follows "
        "the reward of any; none: reward where there is one target, accuracy where every budget is one"))
    decision: Literal["promise", "uncertainty"] = Field(
        "promise", description="what is trained: what may be good (V + 2 U), or only what is uncertain (U), as printed")
    members: int = Field(5, ge=2, le=1_000_000, description="networks of the ensemble")
    hidden: int = Field(64, ge=4, le=8192, description="units of a layer; 200 as printed")
    quantile: float = Field(0.97, gt=0, lt=1, description="running quantile of the score up to which a sample is "
                                                          "trusted; 0.5, the median, as printed")
    trusted_share: float = Field(0.5, ge=0, lt=1, description="of the fresh part of a batch")
    least_trained: int = Field(20, ge=2, le=1_000_000, description=(
        "trained samples before anything is trusted; 100 in our first reading of the paper"))
    extra_draws: int = Field(300, ge=0, le=1_000_000, description=(
        "samples drawn beyond a batch to find untrusted ones; 50 in our first reading of the paper"))
    steps: int = Field(30, ge=1, le=1_000_000, description=(
        "of Adam after each policy update; 10 in our first reading of the paper"))
    pretraining_steps: int = Field(1000, ge=0, le=1_000_000, description=(
        "on the samples of earlier runs, before the search"))


class BufferSettings(Frozen):
    """Architecture experience buffer (section 6)."""

    size: int = Field(10, ge=0, le=1_000_000, description="architectures kept; 0: no buffer")
    share: float = Field(0.5, ge=0, lt=1, description="largest share of a batch that comes from the buffer")
    eviction: Eviction = Field("top", description="the best ones, or quantiles: different rewards")
    temperature: float | None = Field(1.0, gt=0, description="of the priorities, 1 is Eq. 5; none: std of the rewards")
    rho_min: float = Field(0.1, ge=0, description="smallest correction of an old sample; 0: exact")
    rho_max: float = Field(2.0, gt=0, description="largest correction of an old sample")


class PolicySettings(Frozen):
    """LSTM policy and PPO (section 3)."""

    hidden: int = Field(100, ge=4, le=8192, description="units of the LSTM")
    learning_rate: float = Field(1e-3, gt=0, le=100, description="of Adam; 3.5e-4 in NASNet, for 8,000 trainings")
    clip: float = Field(0.2, gt=0, lt=1, description="of the ratio of new to old probability")
    epochs: int = Field(4, ge=1, le=1_000_000, description="of PPO per batch")
    entropy_start: float = Field(0.1, ge=0, description=(
        "weight of the entropy at the start, per nat of a whole sequence; 1e-3 in our first reading"))
    entropy_end: float = Field(0.01, ge=0, description="when all trainings are spent; 1e-5 in NASNet")
    gradient_norm: float = Field(0.5, gt=0, description="largest norm of a gradient")
    baseline: Literal["mean", "critic"] = Field(
        "mean", description="critic: V(m) in batches without a trusted sample, whose advantage it would make zero")
    baseline_decay: float = Field(0.95, ge=0, lt=1, description="of the moving average of rewards")
    num_learners: int = Field(0, ge=0, le=64, description="learners on the cluster; 0: in the driver")


class FnasSettings(Frozen):
    """All of FNAS; `batch` samples make one update."""

    batch: int = Field(10, ge=2, le=1_000_000, description="samples of one update; 20 in our first reading")
    in_flight: int = Field(2, ge=0, le=1_000_000, description=(
        "trainings that may still run when the next batch is drawn; 0: one batch after the other; as many as "
        "workers keeps all of them busy"))
    stale_after: int = Field(2, ge=0, le=1_000_000, description=(
        "updates after which a late result is corrected like an old sample"))
    max_staleness: int = Field(20, ge=1, le=1_000_000, description=(
        "updates after which nothing new is drawn until the late result is there"))
    reward: RewardSettings = Field(RewardSettings(), description="what is maximised")
    critic: CriticSettings = Field(CriticSettings(), description="what needs no training")
    buffer: BufferSettings = Field(BufferSettings(), description="replay of good architectures")
    policy: PolicySettings = Field(PolicySettings(), description="LSTM and PPO")
