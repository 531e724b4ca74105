"""FNAS as a whole: the contract, replay, what is trained and what is trusted, late results, earlier runs."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from orchestrator.config import parse_config
from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.conformance import SyntheticLatency, check_controller, synthetic_trials
from orchestrator.controllers.controller import EarlierRun, Observation, Task
from orchestrator.controllers.fnas.batch import Sample
from orchestrator.controllers.fnas.controller import Fnas
from orchestrator.services.recipes import slots_needed
from searchspaces.errors import ConfigError
from searchspaces.nasbench201.space import NasBench201

SPACE = NasBench201()
SMALL: dict[str, Any] = {"batch": 6, "policy": {"hidden": 16}, "critic": {"least_trained": 6, "hidden": 32, "steps": 30,
                                                                         "pretraining_steps": 100}}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes: Any) -> dict[str, Any]:
    merged = dict(SMALL)
    for key, value in changes.items():
        merged[key] = {**SMALL.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged


def fnas(seed: int = 1, evaluations: int = 60, earlier: tuple[EarlierRun, ...] = (), **changes: Any) -> Fnas:
    task = Task((9.0,), evaluations, seed, SyntheticLatency(), earlier)
    made = make_controller("fnas", SPACE, task, small(**changes))
    assert isinstance(made, Fnas)
    return made


def trials_of(proposals: list[Any]) -> list[Observation]:
    return synthetic_trials(SPACE, np.stack([p.tokens for p in proposals]))


def search(controller: Fnas, evaluations: int, step: int = 4) -> list[Observation]:
    log: list[Observation] = []
    while len(log) < evaluations and (proposals := controller.propose(min(step, evaluations - len(log)))):
        fresh = trials_of(proposals)
        controller.observe(fresh)
        log += fresh
    return log


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [0, 9])
def test_keeps_the_contract(in_flight: int) -> None:
    assert check_controller("fnas", small(in_flight=in_flight)) == []


def test_replay_rebuilds_policy_critic_and_buffer() -> None:
    original = fnas()
    log = search(original, 40)
    original.propose(0)  # learns from the last trials
    rebuilt = fnas()
    rebuilt.observe(log)
    assert [p.tokens.tolist() for p in rebuilt.propose(5)] == [p.tokens.tolist() for p in original.propose(5)]
    ours, theirs = original.state_dict(), rebuilt.state_dict()
    assert ours.keys() == theirs.keys() and any(key.startswith("policy.") for key in ours)
    for key, value in ours.items():
        assert np.array_equal(np.asarray(value), np.asarray(theirs[key])), key
    assert original.metrics() == pytest.approx(rebuilt.metrics(), nan_ok=True)


def test_the_state_after_the_last_answer_holds_the_last_trials() -> None:
    controller = fnas(evaluations=12)
    log = search(controller, 12)
    controller.generate([9.0])
    best = max(trial.accuracy for trial in log[-4:] if np.isfinite(trial.accuracy))
    rewards = {float(e.reward) for e in controller._buffer.entries}
    taught = {controller._rewards[t.tokens.tobytes()] for t in log[-4:] if np.isfinite(t.accuracy)}
    assert best and taught <= rewards and not controller._inbox


def test_a_forgotten_controller_gives_its_learner_back_at_once() -> None:
    """A cycle would keep it, and its room on a cluster, until a garbage collection happens to come."""
    controller = fnas()
    search(controller, 12)
    learner = weakref.ref(controller._learner)
    gc.disable()
    try:
        del controller
        assert learner() is None
    finally:
        gc.enable()


def test_closing_ends_the_learner() -> None:
    controller = fnas()
    search(controller, 12)
    release = controller._learner._release
    assert release.alive
    controller.close()
    assert not release.alive


def test_learners_count_as_cpus_of_the_run() -> None:
    alone, three = (parse_config({"controller": {"name": "fnas", "policy": {"num_learners": n}}}, "test")
                    for n in (0, 3))
    assert slots_needed(three) == slots_needed(alone) + 3


def test_the_critic_saves_trainings_and_the_cap_holds() -> None:
    with_critic, without = fnas(critic={"trusted_share": 0.5}), fnas(critic={"use": False})
    for controller in (with_critic, without):
        search(controller, 60)
    metrics = with_critic.metrics()
    assert metrics["trusted"] > 0
    assert metrics["trusted_share"] <= 0.5
    assert without.metrics()["trusted"] == 0
    assert metrics["trained"] > 50 and np.isfinite(metrics["critic_error"])


def test_metrics_tell_how_good_the_critics_doubt_is_and_what_a_batch_trusted() -> None:
    controller = fnas()
    controller._watched.extend([(0.1, 0.2), (0.2, 0.1), (0.3, 0.4), (0.4, 0.3)])
    kinds = ["trained", "trusted", "known", "trained", "trained"]
    rows = SPACE.sample_uniform(np.random.default_rng(0), 5)
    samples = [Sample(row, row.tobytes(), np.zeros(6), 0, np.zeros(3, np.float32), kind=kind)  # type: ignore[arg-type]
               for row, kind in zip(rows, kinds)]
    controller._counts |= {"trained": 30, "trusted": 70}
    controller._note({}, samples, 0.5)
    metrics = controller.metrics()
    assert metrics["critic_spearman"] == pytest.approx(0.6) and metrics["critic_error"] == pytest.approx(0.25)
    assert (metrics["batch_trusted_share"], metrics["trusted_share"]) == (0.25, 0.7)


@pytest.mark.parametrize("changes", [
    {"critic": {"form": "printed", "decision": "uncertainty", "quantile": 0.5}}, {"buffer": {"temperature": None}}],
    ids=["printed", "temperature"])
def test_other_forms_search_and_are_replayed(changes: dict[str, Any]) -> None:
    """They do something else than the defaults, and the log alone rebuilds them."""
    controller, usual, rebuilt = fnas(**changes), fnas(), fnas(**changes)
    log, other = search(controller, 60), search(usual, 60)
    assert [t.tokens.tolist() for t in log] != [t.tokens.tolist() for t in other]
    assert len({t.tokens.tobytes() for t in log}) == 60
    metrics = controller.metrics()
    assert metrics["trusted"] > 0 and metrics["batch_trusted_share"] <= 0.5 and metrics["trusted_share"] <= 0.5
    rebuilt.observe(log)
    assert [p.tokens.tolist() for p in rebuilt.propose(5)] == [p.tokens.tolist() for p in controller.propose(5)]


def test_nothing_is_trusted_before_enough_was_trained() -> None:
    controller = fnas(critic={"least_trained": 1000})
    search(controller, 60)
    assert controller.metrics()["trusted"] == 0


def test_only_measured_rewards_enter_the_buffer() -> None:
    controller = fnas()
    log = search(controller, 60)
    controller.propose(0)
    measured = {SPACE.canonical(trial.tokens[None])[0].tobytes() for trial in log if np.isfinite(trial.accuracy)}
    entries = controller._buffer.entries
    assert len(entries) == 10
    assert {SPACE.canonical(entry.tokens_T[None])[0].tobytes() for entry in entries} <= measured


def test_failed_architectures_are_neither_learnt_nor_proposed_again() -> None:
    controller = fnas()
    proposals = controller.propose(6)
    failed = [Observation(p.tokens, float("nan"), float("nan"), "diverged") for p in proposals]
    controller.observe(failed)
    again = controller.propose(6)
    assert again and not {p.tokens.tobytes() for p in proposals} & {p.tokens.tobytes() for p in again}
    assert controller.metrics().get("trained", 0) == 0


def test_late_results_are_corrected_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that comes back many updates after its policy counts with a clipped weight, a fresh one with 1."""
    controller = fnas(in_flight=1, stale_after=1, buffer={"size": 0}, policy={"learning_rate": 0.02, "hidden": 16})
    weights: list[np.ndarray] = []
    update = controller._learner.update

    def recording(tokens_NT: Any, advantages_N: Any, weights_N: Any, *rest: Any) -> dict[str, float]:
        weights.append(weights_N)
        return update(tokens_NT, advantages_N, weights_N, *rest)

    monkeypatch.setattr(controller._learner, "update", recording)
    late, *others = controller.propose(6)
    controller.observe(trials_of(others))
    for _ in range(4):
        controller.observe(trials_of(controller.propose(20)))
    before = len(weights)
    assert before >= 3 and all((w == 1).all() for w in weights)
    controller.observe([Observation(late.tokens, 0.6, 5.0)])
    search(controller, 20)
    corrected = [w for w in weights[before:] if (w != 1).any()]
    assert len(corrected) == 1 and (corrected[0] != 1).sum() == 1
    assert 0.1 <= corrected[0][corrected[0] != 1][0] <= 2.0


def test_staleness_is_bounded() -> None:
    """One training of the first batch never comes back; its policy may grow three updates old, no more."""
    controller = fnas(in_flight=6, max_staleness=3, evaluations=300)
    late, *others = controller.propose(6)
    controller.observe(trials_of(others))
    for _ in range(20):
        if not (proposals := controller.propose(20)):
            break
        controller.observe(trials_of(proposals))
    assert not proposals and controller.metrics()["iteration"] == 3
    controller.observe([Observation(late.tokens, float("nan"), float("nan"), "lost")])
    assert controller.propose(20), "a failed training is not waited for"
    assert controller.metrics()["iteration"] > 3


def test_the_critic_is_a_baseline_only_where_nothing_was_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trusted sample's reward is V: with V as baseline its advantage would be zero."""
    controller = fnas(policy={"baseline": "critic"}, critic={"quantile": 0.3})
    plain = fnas(critic={"quantile": 0.3})
    update, given, seen = controller._learner.update, controller._baselines, []

    def noting(fresh: Any, size: int, mean: float) -> Any:
        seen.append((list(fresh), mean))
        return given(fresh, size, mean)

    def checking(tokens_NT: Any, advantages_N: Any, *rest: Any) -> dict[str, float]:
        fresh, mean = seen[-1]
        rewards_N = np.array([sample.reward for sample in fresh])
        trusted = any(sample.kind == "trusted" for sample in fresh)
        wanted_N = np.array([mean if trusted or sample.predicted is None or sample.kind == "known"
                             else sample.predicted for sample in fresh])
        kinds["trusted" if trusted else "critic"] += int((np.abs(wanted_N - mean) > 1e-9).any() or trusted)
        signs = np.sign(rewards_N - wanted_N)
        assert (np.sign(advantages_N[:len(fresh)]) == signs).all()
        return update(tokens_NT, advantages_N, *rest)

    kinds = {"trusted": 0, "critic": 0}
    monkeypatch.setattr(controller, "_baselines", noting)
    monkeypatch.setattr(controller._learner, "update", checking)
    search(controller, 60)
    assert min(kinds.values()) >= 2, "both kinds of batches came up"
    search(plain, 60)
    mean_only = plain._baselines(seen[-1][0], 12, 0.25)
    assert mean_only.tolist() == [0.25] * 12


class OneAnswer:
    """A policy that has collapsed: it samples one architecture only."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def sample(self, n: int, rng: np.random.Generator) -> Any:
        drawn = self._policy.sample(n, rng)
        drawn.tokens_NT[:] = 1
        drawn.log_probs_NT[:] = 0
        return drawn

    def evaluate(self, tokens_NT: Any, *conditions: Any) -> Any:
        return self._policy.evaluate(tokens_NT, *conditions)


def test_a_collapsed_policy_ends_in_random_samples_not_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = fnas()
    monkeypatch.setattr(type(controller._learner), "policy", property(lambda self: OneAnswer(self._policy)))
    log = search(controller, 20)
    assert len({trial.tokens.tobytes() for trial in log}) == 20


def earlier_run(same_task: bool) -> EarlierRun:
    rows = SPACE.canonical(SPACE.sample_uniform(np.random.default_rng(5), 80))
    trials = synthetic_trials(SPACE, np.unique(rows, axis=0), fail_every=10**9)
    return EarlierRun("first", same_task, np.stack([t.tokens for t in trials]), np.array([t.accuracy for t in trials]),
                      np.array([t.latency_ms for t in trials]))


def test_best_of_another_task_is_trained_first_and_the_critic_knows_it() -> None:
    earlier = earlier_run(same_task=False)
    controller = fnas(earlier=(earlier,))
    rewards = controller.reward(earlier.tokens_NT, earlier.accuracy_N, earlier.latency_ms_N)
    under = SyntheticLatency().predict(earlier.tokens_NT) <= 9.0
    best = earlier.tokens_NT[np.argsort(-np.where(under, rewards, -1), kind="stable")[:3]]
    proposed = [p.tokens.tolist() for p in controller.propose(6)]
    assert all(row.tolist() in proposed for row in best)
    assert controller._critic.all_samples == len(earlier.accuracy_N)
    unseen = SPACE.sample_uniform(np.random.default_rng(9), 100)
    truth = [t.accuracy for t in synthetic_trials(SPACE, unseen, fail_every=10**9)]
    assert np.corrcoef(controller._critic.predict(SPACE.features(unseen))[0], truth)[0, 1] > 0.6


def test_rewards_of_the_same_task_enter_the_buffer() -> None:
    earlier = earlier_run(same_task=True)
    controller = fnas(earlier=(earlier,))
    rewards = controller.reward(earlier.tokens_NT, earlier.accuracy_N, earlier.latency_ms_N)
    assert max(e.reward for e in controller._buffer.entries) == pytest.approx(rewards.max())
    assert len(controller._buffer) == 10


def test_reward_of_multiply_adds() -> None:
    rows = SPACE.canonical(SPACE.extremes())
    madds = SPACE.cost(rows)[0].astype(float)
    controller = fnas(reward={"cost": "madds", "target": madds[1] / 2, "form": "hard"})
    rewards = controller.reward(rows, np.array([0.5, 0.8]), np.array([1.0, 1.0]))
    assert rewards == pytest.approx([0.5, 0.4])
    with pytest.raises(ConfigError, match="reward.target is missing"):
        fnas(reward={"cost": "madds"})


def answers(trials: list[tuple[float, float]], budgets_ms: list[float], alternatives: int,
            **reward: Any) -> list[list[tuple[float, float, bool]]]:
    """(accuracy, score, feasible) of the answers to trials of (accuracy, ms), which are the space's cheapest cells."""
    controller = fnas(reward=reward)
    rows = SPACE.canonical(SPACE.sample_uniform(np.random.default_rng(0), 50))
    rows = rows[np.unique(SPACE.cost(rows)[0], return_index=True)[1]][:len(trials)]  # ascending multiply-adds
    controller.observe([Observation(row, *trial) for row, trial in zip(rows, trials, strict=True)])
    return [[(a.accuracy, pytest.approx(a.score), a.feasible) for a in options]
            for options in controller.generate(budgets_ms, alternatives)]


def test_finalists_are_the_best_by_reward_at_each_budget_and_never_over_it() -> None:
    """Half the latency is worth five per cent: 0.80 at 4 ms is better than 0.81 at 8 ms, for a budget of 8 or more."""
    trials = [(0.80, 4.0), (0.81, 8.0), (0.90, 8.1), (0.70, 3.9), (0.79, 4.0)]
    eight, tight, none = answers(trials, [8.0, 4.0, 1.0], 3)
    assert eight == [(0.80, 0.80 * 0.5 ** -0.07, True), (0.79, 0.79 * 0.5 ** -0.07, True), (0.81, 0.81, True)]
    assert tight == [(0.80, 0.80, True), (0.79, 0.79, True), (0.70, 0.70 * 0.975 ** -0.07, True)]
    assert [feasible for _, _, feasible in none] == [False] and none[0][0] == 0.70
    hard, = answers(trials, [8.0], 2, form="hard")
    assert [accuracy for accuracy, _, _ in hard] == [0.81, 0.80]
    plain, = answers(trials, [8.0], 2, form="accuracy")
    assert [accuracy for accuracy, _, _ in plain] == [0.81, 0.80]


def test_finalists_of_a_reward_of_multiply_adds_keep_its_target() -> None:
    """The third cell has more multiply-adds than the target allows: being the fastest does not help it."""
    rows = SPACE.canonical(SPACE.sample_uniform(np.random.default_rng(0), 50))
    madds = np.unique(SPACE.cost(rows)[0])[:4].astype(float)
    target = float(madds[1])
    found, = answers([(0.5, 5.0), (0.6, 7.0), (0.65, 1.0), (0.9, 9.0)], [8.0], 3, form="hard", cost="madds",
                     target=target)
    worth = {0.6: 0.6, 0.5: 0.5, 0.65: 0.65 * target / madds[2]}
    assert worth[0.65] < 0.6, "or the order would be that of the accuracies"
    assert [(accuracy, score) for accuracy, score, _ in found] == sorted(worth.items(), key=lambda pair: -pair[1])


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no option 'critic.membres'; did you mean 'members'"):
        fnas(critic={"membres": 3})


@pytest.mark.slow
def test_policy_learns_to_sample_better_architectures() -> None:
    """Mean reward of what the policy samples, before and after 150 trainings."""
    controller = fnas(evaluations=150, policy={"learning_rate": 3e-3, "hidden": 32})

    def mean_reward() -> float:
        rows = SPACE.canonical(controller._learner.policy.sample(300, np.random.default_rng(0)).tokens_NT)
        trials = synthetic_trials(SPACE, rows, fail_every=10**9)
        accuracy_N, latency_N = (np.array([getattr(t, name) for t in trials]) for name in ("accuracy", "latency_ms"))
        return float(controller.reward(rows, accuracy_N, latency_N).mean())

    before = mean_reward()
    search(controller, 150, step=8)
    assert mean_reward() > before + 0.03
