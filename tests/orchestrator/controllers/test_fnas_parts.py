"""The formulas of FNAS against the worked examples of its specification, and the critic against what it must learn."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from orchestrator.controllers.fnas.batch import Gate, Sampler
from orchestrator.controllers.fnas.controller import advantages, moving_mean
from orchestrator.controllers.fnas.critic import Critic
from orchestrator.controllers.fnas.experience import ExperienceBuffer, importance_weights, priorities, staleness
from orchestrator.controllers.fnas.policy import SampledBatch
from orchestrator.controllers.fnas.settings import CriticSettings
from orchestrator.controllers.rewards import mnasnet
from searchspaces.nasbench201.space import NasBench201

CELLS = NasBench201()
P3 = (0.2119827, 0.3162411, 0.4717762)


def test_reward() -> None:
    accuracy = np.full(3, 0.75)
    latency = np.array([1.2, 0.8, 2.0])
    soft = mnasnet(accuracy, latency, 1.0)
    assert soft / 0.75 == pytest.approx([0.9873186, 1.0157427, 0.9526380], abs=1e-7)
    assert soft[0] == pytest.approx(0.7404889, abs=1e-7)
    assert mnasnet(accuracy, latency, 1.0, 0.0, -1.0) / 0.75 == pytest.approx([1 / 1.2, 1, 0.5])
    tiny = mnasnet(np.ones(2), np.array([0.5, 0.01]), 1.0, floor=0.5)
    assert tiny[0] == tiny[1] == pytest.approx(0.5 ** -0.07)


@pytest.mark.parametrize(("beta", "weights"), [(0.0, (1, 1, 1)), (0.5, (1.2539758, 1.0266685, 0.8405651)),
                                               (1.0, (1.5724552, 1.0540482, 0.7065497))])
def test_priorities_and_importance_weights(beta: float, weights: tuple[float, ...]) -> None:
    p_N = priorities(np.array([0.1, 0.5, 0.9]))
    assert p_N == pytest.approx(P3, abs=1e-7)
    assert importance_weights(p_N, beta) == pytest.approx(weights, abs=1e-7)
    if beta == 1:
        assert p_N * importance_weights(p_N, beta) == pytest.approx([1 / 3] * 3)


def test_old_samples_are_corrected_within_bounds() -> None:
    log_new_NT = np.array([[0.5, 0.5], [-1.5, -1.5], [0.2, -0.1]])
    weights = staleness(log_new_NT, np.zeros((3, 2)), 0.1, 2.0)
    assert weights == pytest.approx([2.0, 0.1, np.exp(0.1)])
    assert staleness(log_new_NT, np.zeros((3, 2)), 0.0, 2.0)[1] == pytest.approx(np.exp(-3))
    assert np.isfinite(staleness(np.array([[800.0]]), np.zeros((1, 1)), 0.1, 2.0)).all()


def test_baseline_and_advantage() -> None:
    baseline, before = 0.70, []
    for reward in (0.70, 0.74, 0.66):
        before.append(reward - baseline)
        baseline = moving_mean(baseline, reward, 0.95)
    assert before == pytest.approx([0, 0.04, -0.042])
    assert baseline == pytest.approx(0.6999)
    rewards_N = np.array([0.5, 0.6, 0.7, 5.0])
    expected = (rewards_N - 0.6) / (rewards_N.std() + 1e-3)
    assert advantages(rewards_N, 0.6) == pytest.approx(expected)
    assert advantages(np.array([0.0, 0.0, 9.0]), 100.0).tolist() == [-3.0] * 3


def filled(buffer: ExperienceBuffer, rewards: list[float]) -> list[float]:
    for i, reward in enumerate(rewards):
        buffer.add(np.array([i % 128, i // 128], np.int8), reward, np.zeros(2))
    return [entry.reward for entry in buffer.entries]


def test_buffer_keeps_the_best_and_different_rewards() -> None:
    rng = np.random.default_rng(0)
    rewards = [float(r) for r in rng.uniform(0, 1, 200)]
    kept = filled(ExperienceBuffer(10), rewards)
    assert len(kept) == 10 and max(rewards) in kept
    slots = {int(10 * np.searchsorted(np.sort(rewards), r) / 200) for r in kept}
    assert len(slots) >= 8, "rewards of all quantiles, not only good ones"
    assert filled(ExperienceBuffer(10, "top"), rewards) == sorted(rewards, reverse=True)[:10]
    assert filled(ExperienceBuffer(0), rewards) == []


def test_newest_wins_its_quantile_and_the_same_architecture_is_kept_once() -> None:
    buffer = ExperienceBuffer(2)
    filled(buffer, [0.9, 0.1, 0.11, 0.12])
    assert sorted(entry.reward for entry in buffer.entries) == [0.12, 0.9]
    buffer.add(np.array([0, 0], np.int8), 0.8, np.zeros(2))  # the first architecture again
    assert sum(entry.tokens_T.tolist() == [0, 0] for entry in buffer.entries) == 1
    assert 0.9 not in [entry.reward for entry in buffer.entries]


def test_draws_follow_the_priorities_without_replacement() -> None:
    buffer = ExperienceBuffer(3)
    filled(buffer, [0.1, 0.5, 0.9])
    first = [buffer.draw(np.random.default_rng(seed), 1, 0.5)[0][0].reward for seed in range(3000)]
    shares = [first.count(reward) / len(first) for reward in (0.1, 0.5, 0.9)]
    assert shares == pytest.approx(P3, abs=0.03)
    drawn, weights = buffer.draw(np.random.default_rng(0), 3, 0.5)
    assert len({entry.reward for entry in drawn}) == 3
    by_reward = dict(zip((entry.reward for entry in drawn), weights))
    assert [by_reward[r] for r in (0.1, 0.5, 0.9)] == pytest.approx([1, 0.8187308, 0.6703200], abs=1e-6)
    assert buffer.draw(np.random.default_rng(0), 0, 0.5)[0] == []


def test_priorities_in_units_of_the_rewards_deviation() -> None:
    """Temperature none: rewards of (.1, .5, .9) count as if their standard deviation were 1."""
    buffer = ExperienceBuffer(3, temperature=None)
    filled(buffer, [0.1, 0.5, 0.9])
    first = [buffer.draw(np.random.default_rng(seed), 1, 0.5)[0][0].reward for seed in range(2000)]
    step = np.exp(np.sqrt(1.5))
    expected = np.array([1, step, step ** 2]) / (1 + step + step ** 2)
    assert [first.count(reward) / len(first) for reward in (0.1, 0.5, 0.9)] == pytest.approx(expected, abs=0.04)


def test_half_of_the_samples_are_below_the_median_doubt() -> None:
    gate = Gate(CriticSettings(decision="uncertainty", quantile=0.5), Critic(3, 0))
    doubts = np.array([0.015, 0.01, 0.03, 0.04])
    scores = gate.scores(np.zeros(4), doubts)
    for score in scores:
        gate.note(score)
    assert gate.threshold == pytest.approx(0.0225)
    assert (scores <= gate.threshold).tolist() == [True, True, False, False]
    promise = Gate(CriticSettings(decision="promise"), Critic(3, 0))
    assert promise.scores(np.array([0.7]), np.array([0.1])) == pytest.approx([0.9])


@pytest.mark.parametrize(("error", "believed"), [(0.09, True), (0.11, False)])
def test_the_critic_is_not_believed_while_a_constant_would_be_better(error: float, believed: bool) -> None:
    """Rewards deviate by 0.1 from their mean; V was wrong by `error` on each of the last 50 samples."""
    critic = Critic(3, 0)
    gate = Gate(CriticSettings(least_trained=20), critic)
    for i in range(200):
        reward = 0.5 + 0.1 * (-1) ** i
        critic.add(np.zeros(3, np.float32), reward, reward + (error if i >= 150 else 5.0))
    assert critic.reward_deviation() == pytest.approx(0.1) and gate.open is believed
    assert not Gate(CriticSettings(use=False), critic).open
    assert not Gate(CriticSettings(least_trained=201), critic).open


class NeverNew:
    """A critic that is sure of everything, of its first features a little less."""

    calibrated, all_samples = True, 100

    def recent_residuals(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def reward_deviation(self) -> float:
        return 1.0

    def predict(self, features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(features_ND), 0.7), features_ND[:, 0] * 0.1 + 0.01 * np.arange(len(features_ND))


class CountedPolicy:
    """Uniform samples; notes how many were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample(self, n: int, rng: np.random.Generator) -> SampledBatch:
        self.asked.append(n)
        rows = CELLS.sample_uniform(rng, n)
        return SampledBatch(rows, np.zeros(rows.shape))


def test_if_all_is_trusted_resampling_is_bounded_and_the_most_doubtful_are_trained() -> None:
    policy, settings = CountedPolicy(), CriticSettings(extra_draws=30)
    sampler = Sampler(CELLS, settings, NeverNew(), lambda rows: np.ones(len(rows), bool))  # type: ignore[arg-type]
    for _ in range(200):
        sampler.gate.note(1e9)  # a threshold over everything
    batch = sampler.draw(policy, 0, {}, set(), 8, np.random.default_rng(0))  # type: ignore[arg-type]
    assert policy.asked == [38]
    assert [s.kind for s in batch.settled] == ["trusted"] * 4 and {s.reward for s in batch.settled} == {0.7}
    assert len(batch.to_train) == 4 and len(batch.discarded) > 4
    assert min(s.doubt for s in batch.to_train) >= max(s.doubt for s in batch.discarded)


def test_losses_of_the_printed_critic() -> None:
    """Eq. 3 and 4 for V = (.70, .72, .65, .60), R = (.71, .70, .66, .50), U = (.015, .01, .03, .04)."""
    critic = Critic(2, 0, form="printed", hidden=8)
    rewards = torch.tensor([0.71, 0.70, 0.66, 0.50])
    features = torch.eye(4)[:, :2]
    rows = torch.arange(4)[None]
    value = critic._value(features[rows])[0]
    doubt = torch.nn.functional.softplus(critic._doubt(features[rows])[0])  # type: ignore[misc]
    residuals = torch.tensor([0.01, 0.02, float("nan"), 0.10])
    expected = (value - rewards).abs().mean() + (doubt - residuals).abs()[[0, 1, 3]].mean()
    assert float(critic._loss(features, rewards, residuals, rows)) == pytest.approx(float(expected))
    v, u, r = (np.array(x) for x in ((.70, .72, .65, .60), (.015, .01, .03, .04), rewards.numpy()))
    assert np.abs(v - r) == pytest.approx([.01, .02, .01, .10], abs=1e-6)
    assert np.abs(u - np.abs(v - r)) == pytest.approx([.005, .01, .02, .06], abs=1e-6)


def linear_task(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features_ND = rng.random((n, 10), dtype=np.float32)
    return features_ND, 0.5 + 0.05 * features_ND.astype(np.float64) @ np.linspace(-1, 1, 10)


@pytest.mark.parametrize("form", ["ensemble", "printed"])
def test_critic_learns_the_reward(form: str) -> None:
    train, rewards = linear_task(150, 0)
    critic = Critic(10, 0, form, hidden=32)  # type: ignore[arg-type]
    for row, reward in zip(train, rewards):
        critic.add(row, float(reward), None)
    critic.fit(400)
    unseen, truth = linear_task(200, 1)
    values, doubts = critic.predict(unseen)
    assert spearmanr(values, truth)[0] > 0.95
    assert np.abs(values - truth).mean() < 0.3 * truth.std()
    assert (doubts >= 0).all()


def test_ensemble_doubts_what_it_has_not_seen() -> None:
    train, rewards = linear_task(100, 0)
    critic = Critic(10, 0, hidden=32)
    for row, reward in zip(train, rewards):
        critic.add(row, float(reward), None)
    critic.fit(400)
    _, near = critic.predict(train)
    _, far = critic.predict(3 * train + 2)
    assert np.median(far) > 5 * np.median(near)


def test_printed_doubt_learns_errors_made_before_the_fit() -> None:
    """Half of the samples were predicted badly before their training; the fit of V cannot hide that from U."""
    rng = np.random.default_rng(0)
    critic = Critic(2, 0, form="printed", hidden=32)
    for i in range(200):
        bad = i % 2
        reward = 0.5 + 0.1 * float(rng.standard_normal())
        critic.add(np.array([bad, 1 - bad], np.float32), reward, reward + (0.2 if bad else 0.01))
    critic.fit(400)
    _, doubts = critic.predict(np.eye(2, dtype=np.float32))
    assert doubts[0] == pytest.approx(0.2, abs=0.06) and doubts[1] == pytest.approx(0.01, abs=0.03)


def test_another_task_teaches_the_order_but_not_the_scale() -> None:
    """The earlier task's rewards are 0.1 r + 0.9; a handful of own samples set the scale."""
    critic = Critic(10, 0, hidden=32)
    features, rewards = linear_task(300, 2)
    critic.add_earlier(features, 0.1 * rewards + 0.9)
    critic.fit(500)
    own, own_rewards = linear_task(8, 3)
    unseen, truth = linear_task(200, 4)
    assert spearmanr(critic.predict(unseen)[0], truth)[0] > 0.9
    for row, reward in zip(own, own_rewards):
        critic.add(row, float(reward), None)
    assert np.abs(critic.predict(unseen)[0] - truth).mean() < 0.05, "in units of the own task"
    assert critic.trained_samples == 8 and critic.all_samples == 308


def test_printed_doubt_is_transferred() -> None:
    """Half of the earlier rewards are noise that V cannot know in advance, though it can learn them by heart; U must
    know from the start of the next search which half."""
    rng = np.random.default_rng(0)
    features = rng.random((200, 10), dtype=np.float32)
    noisy = np.arange(200) % 2
    features[:, 0] = noisy
    critic = Critic(10, 0, form="printed", hidden=64)
    critic.add_earlier(features, 0.5 + 0.1 * noisy * rng.standard_normal(200))
    critic.pretrain(1000)
    unseen = rng.random((200, 10), dtype=np.float32)
    unseen[:, 0] = noisy
    doubts = critic.predict(unseen)[1]
    assert np.median(doubts[noisy == 1]) > 3 * np.median(doubts[noisy == 0])
    assert critic.all_samples == 200


def test_critic_is_a_function_of_its_seed() -> None:
    def predictions(seed: int) -> list[float]:
        critic = Critic(10, seed, hidden=16)
        for row, reward in zip(*linear_task(30, 0)):
            critic.add(row, float(reward), None)
        torch.rand(seed + 1)  # the global state plays no part
        critic.fit(20)
        return list(critic.predict(linear_task(5, 1)[0])[0])

    assert predictions(1) == predictions(1) != predictions(2)
