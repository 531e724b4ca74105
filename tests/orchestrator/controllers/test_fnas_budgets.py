"""FNAS for many budgets: the policy given a budget, rewards in hindsight, what is picked for which budget, replay; and
that a search for one target is what it was before budgets could be many.

Shape legend: N sequences, T token positions, K anchors.
"""
from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t as student

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.conformance import SyntheticLatency
from orchestrator.controllers.controller import EarlierRun, LatencyModel, Observation, Task
from orchestrator.controllers.fnas.aimed import AimedSampler
from orchestrator.controllers.fnas.budgets import Budgets, MovingMeans, targets
from orchestrator.controllers.fnas.controller import Fnas
from orchestrator.controllers.fnas.experience import ExperienceBuffer, priorities
from orchestrator.controllers.fnas.finalists import smoothed
from orchestrator.controllers.fnas.hindsight import Hindsight, Trained
from orchestrator.controllers.fnas.policy import LstmPolicy
from orchestrator.controllers.fnas.settings import CriticSettings, FnasSettings
from orchestrator.controllers.rewards import mnasnet
from searchspaces.errors import ConfigError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens
from tests.orchestrator.controllers.toy import ToyLatency, ToySpace, toy_accuracy

SPACE, CELLS = ToySpace(), NasBench201()
LATENCY = ToyLatency(SPACE)
SMALL: dict[str, Any] = {"batch": 6, "policy": {"hidden": 16}, "critic": {"least_trained": 6, "hidden": 32, "steps": 5}}
BUDGETS_MS = (4.0, 6.0, 9.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def trials(rows_NT: Tokens) -> list[Observation]:
    return [Observation(row, float(a), float(ms))
            for row, a, ms in zip(rows_NT, toy_accuracy(SPACE, rows_NT), LATENCY.predict(rows_NT))]


def search(controller: Fnas, evaluations: int) -> list[Observation]:
    log: list[Observation] = []
    while len(log) < evaluations and (proposals := controller.propose(min(4, evaluations - len(log)))):
        log += (fresh := trials(np.stack([p.tokens for p in proposals])))
        controller.observe(fresh)
    return log


def fnas(budgets_ms: tuple[float, ...] = BUDGETS_MS, latency: LatencyModel | None = LATENCY, seed: int = 3,
         earlier: tuple[EarlierRun, ...] = (), **options: Any) -> Fnas:
    made = make_controller("fnas", SPACE, Task(budgets_ms, 60, seed, latency, earlier), SMALL | options)
    assert isinstance(made, Fnas)
    return made


# --- one target is the paper's case ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("budgets_ms", "reward", "latency", "expected"), [
    ((9.0,), {}, LATENCY, "49fff750c0b382f9"), ((5.0, 9.0), {"target": 6.0, "form": "hard"}, None, "021d7bd3e21f1a67"),
    ((5.0, 9.0), {"form": "accuracy"}, LATENCY, "7f4e8cefc40b6ee6")])
def test_one_target_proposes_what_it_did_before_budgets_could_be_many(
        budgets_ms: tuple[float, ...], reward: dict[str, Any], latency: LatencyModel | None, expected: str) -> None:
    """Recorded from the version whose policy knew no budgets."""
    log = search(fnas(budgets_ms, latency, reward=reward), 40)
    assert hashlib.sha256(b"".join(trial.tokens.tobytes() for trial in log)).hexdigest()[:16] == expected


@pytest.mark.parametrize(("options", "expected"), [
    ({}, BUDGETS_MS), ({"reward": {"target": 6.0}}, None), ({"reward": {"form": "accuracy"}}, None),
    ({"reward": {"cost": "madds", "target": 3e8}}, None), ({"critic": {"predicts": "reward"}}, None),
    ({"reward": {"target": 6.0}, "critic": {"predicts": "accuracy"}}, (6.0,))])
def test_which_targets_are_told_apart(options: dict[str, Any], expected: tuple[float, ...] | None) -> None:
    found = targets(FnasSettings.model_validate(options), (9.0, *BUDGETS_MS))
    assert (None if found is None else found.values_ms) == expected
    assert targets(FnasSettings(), (9.0, 9.0)) is None
    wrong = FnasSettings.model_validate({"reward": {"form": "accuracy"}, "critic": {"predicts": "accuracy"}})
    with pytest.raises(ConfigError, match="critic.predicts is accuracy, but"):
        targets(wrong, (9.0,))


# --- policy and baseline, given T ------------------------------------------------------------------------------------

def by_hand(policy: LstmPolicy, tokens_T: Tokens, condition_K: NDArray[np.float32]) -> float:
    """log pi(a | T) of one row from the equations of an LSTM, token by token."""
    weights = {name: value.detach().double().numpy() for name, value in policy.named_parameters()}
    hidden = weights["start"].shape[0]
    h_H, c_H, x_H, total = np.zeros(hidden), np.zeros(hidden), weights["start"], 0.0
    for t, token in enumerate(tokens_T):
        given_H = x_H + condition_K @ weights["condition.weight"]
        gates = (weights["lstm.weight_ih_l0"] @ given_H + weights["lstm.bias_ih_l0"]
                 + weights["lstm.weight_hh_l0"] @ h_H + weights["lstm.bias_hh_l0"])
        i_H, f_H, o_H = (1 / (1 + np.exp(-gates.reshape(4, hidden)[k])) for k in (0, 1, 3))
        c_H = f_H * c_H + i_H * np.tanh(gates.reshape(4, hidden)[2])
        h_H = o_H * np.tanh(c_H)
        logits = (weights["head_weight"][t] @ h_H + weights["head_bias"][t])[:len(policy.space.choices[t].values)]
        if policy.space.live_mask(tokens_T[None])[0, t]:
            total += logits[token] - np.log(np.exp(logits).sum())
        x_H = weights["embedding.weight"][int(policy.kind_offset_T[t]) + token]
    return float(total)


def test_probabilities_given_a_budget_against_the_equations_and_by_enumeration() -> None:
    budgets = Budgets.of(BUDGETS_MS)
    policy = LstmPolicy(SPACE, hidden=8, seed=1, conditions=3)
    for parameter in policy.parameters():
        parameter.data.mul_(10)
    rows_NT = np.array(list(np.ndindex(*SPACE.vocabulary_sizes)), dtype=np.int8)
    live_NT = SPACE.live_mask(rows_NT)
    rows_NT = np.unique(np.where(live_NT, rows_NT, 0), axis=0)      # dead tokens stand for all of their values
    totals = []
    for budget_ms in (4.0, 5.0, 9.0):
        weights_NK = np.repeat(budgets.weights(np.array([budget_ms])), len(rows_NT), axis=0)
        log_N = policy.evaluate(rows_NT, weights_NK)[0].sum(axis=1)
        for row in (0, 100, len(rows_NT) - 1):
            assert log_N[row] == pytest.approx(by_hand(policy, rows_NT[row], weights_NK[0]), abs=1e-5)
        assert np.exp(log_N).sum() == pytest.approx(1, abs=1e-5)
        totals.append(log_N)
    assert np.abs(totals[0] - totals[2]).max() > 0.1, "the budget matters"
    drawn = policy.sample(50, np.random.default_rng(0), budgets.weights(np.full(50, 5.0)))
    again_NT = policy.evaluate(drawn.tokens_NT, budgets.weights(np.full(50, 5.0)))[0]
    assert drawn.log_probs_NT == pytest.approx(again_NT, abs=1e-5)


def test_a_policy_starts_alike_with_and_without_budgets() -> None:
    plain, given = LstmPolicy(SPACE, 8, seed=4), LstmPolicy(SPACE, 8, seed=4, conditions=3)
    given.condition.weight.data.zero_()
    rows_NT = plain.sample(20, np.random.default_rng(0)).tokens_NT
    same_NT = given.evaluate(rows_NT, np.eye(3, dtype=np.float32)[[0] * 20])[0]
    assert np.array_equal(plain.evaluate(rows_NT)[0], same_NT)


def test_targets_cover_the_asked_range_and_half_of_them_are_asked_for() -> None:
    budgets = Budgets.of((9.0, 4.0, 5.0, 4.0))
    drawn = budgets.draw(4000, np.random.default_rng(0))
    assert (drawn.min(), drawn.max()) == (4.0, 9.0)
    asked = np.isin(drawn, budgets.values_ms)
    assert asked.mean() == pytest.approx(0.5, abs=0.05)
    assert [(drawn[asked] == b).mean() for b in (4.0, 5.0, 9.0)] == pytest.approx([1 / 3] * 3, abs=0.03)
    assert (drawn[~asked] < 5.0).mean() == pytest.approx(0.5, abs=0.05), "each interval counts alike"
    assert budgets.weights(np.array([3.0, 4.0, 4.25, 7.0, 11.0])).tolist() == [
        [1, 0, 0], [1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1]]
    assert [budgets.holding(ms) for ms in (1.0, 4.0, 4.1, 20.0)] == [4.0, 4.0, 5.0, 9.0]


def test_each_target_has_its_own_baseline() -> None:
    means = MovingMeans(Budgets.of((4.0, 8.0)), 0.9)
    assert means.at(np.array([4.0, 8.0]), 0.3).tolist() == [0.3, 0.3]
    means.add(np.array([4.0, 8.0]), np.array([0.2, 0.6]))           # both anchors start at the mean, 0.4
    means.add(np.array([4.0, 6.0]), np.array([0.2, 0.8]))
    low, high = 0.2 + 0.9 * 0.2, 0.6 - 0.9 * 0.2                    # after the first batch
    mean_low = (0.2 + 0.5 * 0.8) / 1.5                              # of the second: one whole reward and a half
    low, high = mean_low + 0.9 ** 1.5 * (low - mean_low), 0.8 + 0.9 ** 0.5 * (high - 0.8)
    assert means.at(np.array([4.0, 6.0, 8.0, 99.0]), 0.3) == pytest.approx([low, (low + high) / 2, high, high])


# --- rewards in hindsight --------------------------------------------------------------------------------------------

def hard(tokens_NT: Tokens, accuracy_N: Any, latency_ms_N: Any, budget_ms: float) -> NDArray[np.float64]:
    return np.asarray(mnasnet(accuracy_N, latency_ms_N, budget_ms, 0.0, -1.0))


def remembered(rows_NT: Tokens, accuracy_N: Any, latency_N: Any, size: int = 3) -> Hindsight:
    memory = Hindsight(hard, partial(ExperienceBuffer, size, "top"))
    for row_T, accuracy, ms in zip(rows_NT, accuracy_N, latency_N):
        memory.add(Trained(row_T, row_T, CELLS.features(row_T[None])[0], float(accuracy), float(ms), np.zeros(6)))
    return memory


def test_a_trained_network_is_experience_for_every_target() -> None:
    rng = np.random.default_rng(0)
    rows_NT = np.unique(CELLS.sample_uniform(rng, 40), axis=0)
    accuracy_N, latency_N = rng.random(len(rows_NT)), rng.uniform(1, 10, len(rows_NT))
    memory = remembered(rows_NT, accuracy_N, latency_N)
    for budget_ms in (2.0, 5.0, 20.0):
        rewards_N = accuracy_N * np.minimum(1, budget_ms / latency_N)
        top = np.argsort(-rewards_N)[:3]
        assert memory.best(budget_ms) == pytest.approx(rewards_N.max())
        drawn, weights = memory.draw(np.random.default_rng(1), np.full(200, budget_ms), beta=1.0)
        assert {e.budget_ms for e in drawn} == {budget_ms}
        for experience in drawn:
            row = next(i for i, r in enumerate(rows_NT) if np.array_equal(r, experience.tokens_T))
            assert row in top and experience.reward == pytest.approx(rewards_N[row])
        p_n = priorities(rewards_N[top])
        assert weights.max() == 1 and weights.min() == pytest.approx(p_n.min() / p_n.max())
    best_of = {memory.draw(rng, np.array([b]), 0.0)[0][0].reward for b in (2.0, 20.0) for _ in range(20)}
    assert len(best_of) > 3, "other targets, other rewards"


def test_earlier_networks_are_lessons_until_they_are_trained_here() -> None:
    row_T = CELLS.sample_uniform(np.random.default_rng(0), 1)[0]
    trained = Trained(row_T, row_T, CELLS.features(row_T[None])[0], 0.4, 2.0, np.zeros(6))
    memory = Hindsight(hard, partial(ExperienceBuffer, 3, "top"))
    memory.add_earlier(trained)
    assert (len(memory), memory.lessons, memory.row(row_T.tobytes())) == (0, 1, None)
    assert memory.draw(np.random.default_rng(0), np.array([1.0]), 0.5)[0][0].reward == pytest.approx(0.2)
    memory.add(trained)
    assert (len(memory), memory.lessons, memory.row(row_T.tobytes())) == (1, 1, 0)


# --- what is picked --------------------------------------------------------------------------------------------------

class Known:
    """A critic that gives accuracies by a rule, sure of them."""

    calibrated, all_samples = True, 100

    def recent_residuals(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)

    def reward_deviation(self) -> float:
        return 1.0

    def predict(self, features_ND: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        value_N = 0.3 + 0.4 * (features_ND @ np.linspace(0, 1, features_ND.shape[1]) % 1.0)
        return value_N.astype(np.float64), np.full(len(features_ND), 0.01)


class Uniform:
    """A policy that ignores budgets."""

    def sample(self, n: int, rng: np.random.Generator, conditions_NK: NDArray[np.float32]) -> Any:
        rows_NT = CELLS.sample_uniform(rng, n)
        self.drawn_NT = rows_NT
        return type("Drawn", (), {"tokens_NT": rows_NT, "log_probs_NT": np.zeros(rows_NT.shape)})

    def evaluate(self, tokens_NT: Tokens, conditions_NK: NDArray[np.float32]) -> Any:
        return np.repeat(conditions_NK[:, :1].astype(np.float64), 6, axis=1), None


def test_each_training_is_the_most_promising_draw_for_its_target() -> None:
    budgets, policy, critic, latency = Budgets.of((4.0, 6.0)), Uniform(), Known(), SyntheticLatency()
    rows_NT = np.unique(CELLS.sample_uniform(np.random.default_rng(9), 12), axis=0)
    memory = remembered(rows_NT, np.full(len(rows_NT), 0.35), latency.predict(rows_NT))
    sampler = AimedSampler(CELLS, CriticSettings(extra_draws=200), critic, budgets, memory, hard,  # type: ignore[arg-type]
                           latency, lambda rows: np.ones(len(rows), bool), 6.0)
    batch = sampler.draw(policy, 0, set(), 4, np.random.default_rng(2))  # type: ignore[arg-type]
    assert len(batch.to_train) == 2 and [s.kind for s in batch.settled] == ["trusted"] * 2
    pool_NT = np.unique(policy.drawn_NT, axis=0)
    pool_NT = pool_NT[[row.tobytes() not in {r.tobytes() for r in rows_NT} for row in pool_NT]]
    value_N, latency_N = critic.predict(CELLS.features(pool_NT))[0] + 0.02, latency.predict(pool_NT)
    taken: list[int] = []
    for sample in batch.to_train:
        assert sample.budget_ms is not None
        known_M = critic.predict(CELLS.features(rows_NT))[0][latency.predict(rows_NT) <= sample.budget_ms]
        gain_N = np.maximum(value_N - known_M.max(initial=0), 0) + 1e-3 * value_N
        error = 0.007 / student.ppf(0.75, 3)        # latencies are exact: the least error
        promise_N = gain_N * student.cdf(np.log(sample.budget_ms / latency_N) / error, 3)
        promise_N[taken] = -1
        taken.append(int(promise_N.argmax()))
        assert sample.key == pool_NT[taken[-1]].tobytes()
        assert np.all(sample.log_mu_T == budgets.weights(np.array([sample.budget_ms]))[0, 0]), "as if drawn for its T"
    for sample in batch.settled:
        assert sample.predicted is not None and sample.budget_ms is not None
        assert sample.reward == pytest.approx(sample.predicted * min(1, sample.budget_ms / sample.latency_ms))


# --- as a whole ------------------------------------------------------------------------------------------------------

def test_a_search_for_many_budgets_is_replayed_and_finds_the_best_of_each() -> None:
    controller, rebuilt = fnas(latency=None), fnas(latency=None)
    log = search(controller, 60)
    assert len({trial.tokens.tobytes() for trial in log}) == 60
    rebuilt.observe(log)
    ours, theirs = controller.propose(5), rebuilt.propose(5)
    assert [(p.tokens.tolist(), p.budget_ms) for p in ours] == [(p.tokens.tolist(), p.budget_ms) for p in theirs]
    assert len({p.budget_ms for p in ours}) > 1 and all(4 <= (p.budget_ms or 0) <= 9 for p in ours)
    state, other = controller.state_dict(), rebuilt.state_dict()
    assert all(np.array_equal(np.asarray(state[key]), np.asarray(other[key])) for key in state)
    assert controller.metrics() == pytest.approx(rebuilt.metrics(), nan_ok=True)
    everything = SPACE.everything()
    accuracy_N, latency_N = toy_accuracy(SPACE, everything), LATENCY.predict(everything)
    for budget_ms, (answer,) in zip(BUDGETS_MS, controller.generate(BUDGETS_MS)):
        assert answer.feasible and answer.observed and answer.latency_ms <= budget_ms
        assert answer.accuracy >= np.sort(accuracy_N[latency_N <= budget_ms])[-3]


def test_what_was_best_elsewhere_for_each_budget_is_trained_first() -> None:
    rows_NT = SPACE.everything()[::7]
    rows_NT = rows_NT[LATENCY.predict(rows_NT) <= max(BUDGETS_MS)]
    accuracy_N, latency_N = toy_accuracy(SPACE, rows_NT), LATENCY.predict(rows_NT)
    controller = fnas(earlier=(EarlierRun("first", False, rows_NT, accuracy_N, latency_N),))
    first = [p.tokens.tolist() for p in controller.propose(6)]
    for budget_ms in BUDGETS_MS:
        assert rows_NT[np.argmax(accuracy_N * np.minimum(1, budget_ms / latency_N))].tolist() in first
    again = fnas(earlier=(EarlierRun("first", True, rows_NT, accuracy_N, latency_N),))
    assert len(again.propose(6)) == 3 and again._trained.lessons == len(rows_NT) and not again._recommended


def test_answers_are_chosen_by_smoothed_accuracies_where_these_predict() -> None:
    """A line in one feature and noise of its size: the best measured one is lucky, the best smoothed one nearly best.
    Pure noise is left as it was measured."""
    rng = np.random.default_rng(0)
    features_MD = rng.random((120, 3), dtype=np.float32)
    truth_M = 0.5 + 0.1 * features_MD[:, 0].astype(np.float64)
    noise_M = 0.03 * rng.standard_normal(120)
    smooth_M = smoothed(features_MD, truth_M + noise_M, 0)
    assert np.abs(smooth_M - truth_M).mean() < 0.7 * np.abs(noise_M).mean()
    assert np.array_equal(smoothed(features_MD, noise_M, 0), noise_M)
    assert smoothed(features_MD[:10], truth_M[:10], 0) is not None and (smoothed(features_MD[:10], truth_M[:10], 0)
                                                                      == truth_M[:10]).all()
