"""Settings of PNAG. The defaults are ours; `variant` selects another procedure: the printed one, the released code's,
or the specification's (pnag.md), which is the printed one with its gaps filled.

Where they differ is listed in pnag.md 7, 8 and 13, and why ours differ from the specification's in docs/pnag.md;
`resolved` is the one place that maps a variant to values, and only fields that the user left alone are mapped.
"""
from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from orchestrator.prediction.posterior import PosteriorSettings
from orchestrator.settings import Frozen

Reward = Literal["rule", "cost_only", "multiplicative", "absolute"]


class EvaluatorSettings(Frozen):
    """R(a|B; w): a ranking network fitted to dominance labels (pnag.md 7)."""

    hidden: int = Field(128, ge=4, le=8192, description=(
        "units of its layers; 512 in paper and code, for 16,000 triplets; ours learns from hundreds"))
    loss: Literal["hinge", "logistic"] = Field("hinge", description="hinge as printed, logistic as in the code")
    ties: Literal["drop", "printed", "released"] = Field("drop", description=(
        "pairs without a winner: left out, or labelled as printed or as in the code"))
    cost_tie_share: float = Field(0.01, ge=0, lt=1, description="costs closer than this share are a tie")
    optimiser: Literal["sgd", "adam"] = Field("adam", description="adam, or sgd as in the paper")
    learning_rate: float = Field(3e-3, gt=0, le=100, description="at the start of a cosine")
    final_learning_rate: float = Field(2e-5, gt=0, le=100, description="at its end")
    schedule_epochs: int | None = Field(None, ge=1, le=1_000_000, description=(
        "length of the cosine; none: the epochs that are run"))
    weight_decay: float = Field(3e-5, ge=0, description="L2 penalty of the weights")
    epochs: int = Field(20, ge=1, le=1_000_000, description="passes over the observed trials")
    least_steps: int = Field(200, ge=0, le=1_000_000, description="more epochs where these hold fewer steps than this")
    batch_size: int = Field(128, ge=2, le=1_000_000, description="triplets of one step; 256 in the code")
    budgets_per_batch: int = Field(4, ge=1, le=1_000_000, description=(
        "random budgets whose pairs one step sees; at most K"))
    p_interp: float = Field(0.5, ge=0, le=1, description="share of budgets drawn between the training budgets; the "
                                                         "labels of such a budget are exact")
    round_effort: float = Field(0.25, gt=0, le=1, description="share of the epochs and steps before each round of "
                                                             "proposals; the whole is for the final training")
    holdout_share: float = Field(0.2, ge=0, lt=1, description="trials kept for the rank correlation that is reported")
    pseudo_triplets: int = Field(800, ge=0, le=1_000_000, description=(
        "architectures labelled by the posterior and added to the observed triplets; 0 as in the paper"))


class GeneratorSettings(Frozen):
    """pi(a|B; theta): an LSTM conditioned on a budget embedding (pnag.md 4, 5, 8)."""

    hidden: int = Field(64, ge=4, le=8192, description="units of the LSTM")
    budget_every_step: bool = Field(False, description="the budget is an input of every step, not of the first alone")
    mask_dead_tokens: bool = Field(True, description="tokens without influence give no gradient")
    samples_per_budget: int = Field(8, ge=1, le=1_000_000, description="architectures drawn per budget and update")
    single_budget: bool = Field(False, description="one random budget per update, as the released code")
    p_interp: float = Field(0.5, ge=0, le=1, description="share of budgets drawn between the training budgets")
    baseline_decay: float | None = Field(0.95, ge=0, lt=1, description="EMA of mean and spread; none: raw")
    reward_scale: float = Field(1.0, gt=0, description="factor of the reward")
    entropy_start: float = Field(0.3, ge=0, description=(
        "weight of the entropy at the first update, per nat, beside a unit-variance advantage"))
    entropy_end: float = Field(0.03, ge=0, description="the same at the last update")
    learning_rate: float = Field(3e-3, gt=0, le=100, description="of Adam")
    gradient_norm: float | None = Field(5.0, gt=0, description="largest norm of a gradient; none: unbounded")
    updates: int = Field(400, ge=1, le=1_000_000, description="updates of the final training")
    round_updates: int = Field(20, ge=1, le=1_000_000, description="updates before each round of proposals")
    patience: int | None = Field(None, ge=1, le=1_000_000, description=(
        "updates without a better mean reward before training stops; none: all updates are made"))


class CollectionSettings(Frozen):
    """Which architectures are worth an evaluation: a random start, then rounds of proposals."""

    warmup: int = Field(20, ge=2, le=1_000_000, description=(
        "random architectures before the first round; with earlier runs half as many, half of them promising"))
    batch: int = Field(5, ge=1, le=1_000_000, description="least evaluations between two rounds of learning")
    growth: float = Field(0.2, ge=0, le=1, description="a round has at least this share of the trials known before it")
    candidates: int = Field(3000, ge=16, le=1_000_000, description="architectures among which uncertainty selects")
    random_only: bool = Field(False, description="plain uniform sampling from the start to the end, as in the paper")


class PnagSettings(Frozen):
    variant: Literal["ours", "specified", "printed", "released"] = Field("ours", description=(
        "whose procedure: see docs/pnag.md"))
    reward: Reward = Field("rule", description="how cost enters the reward (pnag.md 5)")
    budgets: int = Field(10, ge=1, le=1_000_000, description="K training budgets")
    range_ms: tuple[float, float] | None = Field(None, description="B_1 and B_K; none: see range_from")
    range_from: Literal["task", "trials"] = Field("task", description=(
        "the task's budgets, where it has two or more, or the 5th to 95th percentile of the latencies observed"))
    joint: bool = Field(True, description="false: one evaluator and generator per budget of the task")
    reward_exponent: float = Field(-0.07, description="of the multiplicative reward")
    reward_pays_below_budget: bool = Field(True, description="false: c/B counts as at least 1 (pnag.md 15)")
    reward_coefficient: float = Field(0.07, description="of the absolute reward")
    answer: Literal["posterior", "evaluator"] = Field("posterior", description=(
        "what ranks an answer's candidates: the posterior, trials among them, or R, the generator's draws alone"))
    generate_samples: int = Field(32, ge=1, le=1_000_000, description=(
        "architectures drawn per asked budget, beside the greedy one"))
    evaluator: EvaluatorSettings = Field(EvaluatorSettings(), description="the ranking network")
    generator: GeneratorSettings = Field(GeneratorSettings(), description="the policy")
    posterior: PosteriorSettings = Field(PosteriorSettings(), description="the surrogate of the accuracy")
    collection: CollectionSettings = Field(CollectionSettings(), description="which architectures are evaluated")

    def for_rounds(self) -> PnagSettings:
        """What a learner that only serves one round of proposals is trained with."""
        evaluator, share = self.evaluator, self.evaluator.round_effort
        return self.model_copy(update={
            "evaluator": evaluator.model_copy(update={"epochs": max(1, round(evaluator.epochs * share)),
                                                      "least_steps": round(evaluator.least_steps * share)}),
            "generator": self.generator.model_copy(update={"updates": self.generator.round_updates})})

    def resolved(self) -> PnagSettings:
        """The settings with the variant's values wherever the user set none."""
        if self.variant == "ours":
            return self
        changes: dict[str, Any] = {"variant": "ours"}
        for name, value in VARIANTS[self.variant].items():
            if isinstance(value, dict):
                section = getattr(self, name)
                kept = {key: v for key, v in value.items() if key not in section.model_fields_set}
                changes[name] = section.model_copy(update=kept)
            elif name not in self.model_fields_set:
                changes[name] = value
        return self.model_copy(update=changes)


# Uniform triplets, no labels but theirs, budgets over the range of what was seen, answers by the largest R.
PAPER: dict[str, Any] = {"collection": {"random_only": True}, "range_from": "trials", "answer": "evaluator"}
VARIANTS: dict[str, dict[str, Any]] = {
    "specified": PAPER | {
        "evaluator": {"hidden": 512, "optimiser": "sgd", "learning_rate": 0.1, "final_learning_rate": 1e-3,
                      "epochs": 250, "batch_size": 256, "least_steps": 0, "budgets_per_batch": 10,
                      "pseudo_triplets": 0},
        "generator": {"entropy_start": 0.02, "entropy_end": 0.002, "learning_rate": 3e-4, "updates": 120_000,
                      "patience": 2000},
    },
    "printed": PAPER | {
        "evaluator": {"hidden": 512, "ties": "printed", "cost_tie_share": 0.0, "optimiser": "sgd",
                      "learning_rate": 0.1, "final_learning_rate": 1e-3, "epochs": 250, "batch_size": 256,
                      "least_steps": 0, "p_interp": 0.0, "budgets_per_batch": 10, "pseudo_triplets": 0},
        "generator": {"mask_dead_tokens": False, "p_interp": 0.0, "samples_per_budget": 1, "baseline_decay": None,
                      "reward_scale": 1e-3, "entropy_start": 1e-3, "entropy_end": 1e-3, "learning_rate": 3e-4,
                      "gradient_norm": None, "updates": 12_000},
    },
    "released": PAPER | {
        "budgets": 5,
        "evaluator": {"hidden": 512, "loss": "logistic", "ties": "released", "cost_tie_share": 0.0, "optimiser": "sgd",
                      "learning_rate": 0.2, "final_learning_rate": 2e-5, "schedule_epochs": 1000, "epochs": 200,
                      "batch_size": 256, "least_steps": 0, "p_interp": 0.0, "budgets_per_batch": 1,
                      "pseudo_triplets": 0},
        "generator": {"mask_dead_tokens": False, "p_interp": 0.0, "samples_per_budget": 1, "single_budget": True,
                      "baseline_decay": None, "reward_scale": 1e-3, "entropy_start": 1e-3, "entropy_end": 1e-3,
                      "learning_rate": 3e-4, "gradient_norm": None, "updates": 10_001},
    },
}
