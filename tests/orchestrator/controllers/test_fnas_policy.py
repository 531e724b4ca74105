"""The LSTM policy and the PPO learner of FNAS against enumeration, a hand-written loss and a plain-torch peer.

Shape legend: N sequences, T token positions.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from orchestrator.controllers.fnas.learner import PpoLearner
from orchestrator.controllers.fnas.policy import LstmPolicy, inverse_cdf
from orchestrator.controllers.fnas.ppo import PpoSettings, clipped_objective, ppo_batch, ppo_loss, shards
from searchspaces.catalogue import make_space
from searchspaces.errors import ClusterError, SpaceError, StoreError
from searchspaces.graph import Graph
from searchspaces.space import Choice, SearchSpace, Tokens
from tests.benchmarks.plain_ppo import PlainPpo
from tests.orchestrator.controllers.toy import ToySpace


class RisingSpace(SearchSpace):
    """Four digits that never fall, three of vocabulary 3 and one of 4: few enough to enumerate."""

    @property
    def space_id(self) -> str:
        return "rising"

    @property
    def choices(self) -> tuple[Choice, ...]:
        return (*(Choice(f"d{i}", "digit", (0, 1, 2)) for i in range(3)), Choice("last", "last", (0, 1, 2, 3)))

    def graph(self, tokens_T: Tokens) -> Graph:
        raise NotImplementedError("never built")

    def valid(self, prefix: Sequence[int] | Tokens) -> NDArray[np.bool_]:
        least = prefix[-1] if len(prefix) else 0
        return np.arange(len(self.choices[len(prefix)].values)) >= least

    def everything(self) -> Tokens:
        rows = np.array(list(np.ndindex(3, 3, 3, 4)), dtype=np.int8)
        return rows[(np.diff(rows, axis=1) >= 0).all(axis=1)]


class DeadEndSpace(RisingSpace):
    def valid(self, prefix: Sequence[int] | Tokens) -> NDArray[np.bool_]:
        return super().valid(prefix) & (len(prefix) < 2)


pytestmark = pytest.mark.usefixtures("one_thread")


def opinionated(space: SearchSpace, seed: int = 0) -> LstmPolicy:
    """A policy far from uniform: the initial parameters, ten times larger."""
    policy = LstmPolicy(space, hidden=8, seed=seed)
    for parameter in policy.parameters():
        parameter.data.mul_(10)
    return policy


def one_update(space: SearchSpace, policy: LstmPolicy, seed: int = 0, rows: int = 21) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"tokens_NT": policy.sample(rows, rng).tokens_NT, "advantages_N": rng.normal(size=rows),
            "weights_N": rng.uniform(0.1, 2, size=rows), "entropy_weight": 1e-2}


def difference(a: LstmPolicy, b: LstmPolicy) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- policy ----------------------------------------------------------------------------------------------------------

def test_probabilities_of_all_valid_rows_sum_to_one_and_their_entropy_is_that_of_the_sequence() -> None:
    space = RisingSpace()
    log_probs_NT, entropy_NT = opinionated(space).evaluate(space.everything())
    p_N = np.exp(log_probs_NT.sum(axis=1))
    assert p_N.max() > 3 * p_N.min()  # the policy is far from uniform, or the test could not fail
    assert p_N.sum() == pytest.approx(1, abs=1e-6)
    # chain rule: H(a_1..a_T) = E[ sum_t H(a_t | a_<t) ]
    assert (p_N * entropy_NT.sum(axis=1)).sum() == pytest.approx(-(p_N * np.log(p_N)).sum(), abs=1e-6)


def test_samples_follow_the_evaluated_probabilities_and_are_never_invalid() -> None:
    space, n = RisingSpace(), 6000
    policy, rows = opinionated(space, seed=3), space.everything()
    drawn = policy.sample(n, np.random.default_rng(0))
    index = {row.tobytes(): i for i, row in enumerate(rows)}
    counts = np.bincount([index[row.tobytes()] for row in drawn.tokens_NT], minlength=len(rows))  # KeyError: invalid
    expected = n * np.exp(policy.evaluate(rows)[0].sum(axis=1))
    assert expected.min() > 5
    assert chisquare(counts, expected * n / expected.sum()).pvalue > 0.01


def test_an_untrained_policy_on_mnas_samples_every_allowed_value_and_only_those() -> None:
    space = make_space("mnas-s16", classes=10, channels=1, options={})
    tokens_NT = LstmPolicy(space, hidden=16).sample(100, np.random.default_rng(0)).tokens_NT
    for t, choice in enumerate(space.choices):
        allowed = {v for row in tokens_NT for v in np.flatnonzero(space.valid(row[:t]))}
        assert {int(v) for v in tokens_NT[:, t]} == allowed, choice.name
    assert not all(space.valid(tokens_NT[0][:t]).all() for t in range(tokens_NT.shape[1]))  # it has rules


def test_sampling_reports_what_evaluate_says_and_depends_on_the_generator_alone() -> None:
    policy = opinionated(ToySpace())
    before = torch.get_rng_state()
    drawn = policy.sample(50, np.random.default_rng(5))
    log_probs_NT, entropy_NT = policy.evaluate(drawn.tokens_NT)
    np.testing.assert_allclose(drawn.log_probs_NT, log_probs_NT, atol=1e-5)
    dead_NT = ~policy.space.live_mask(drawn.tokens_NT)
    assert dead_NT.any() and not drawn.log_probs_NT[dead_NT].any() and not entropy_NT[dead_NT].any()
    assert (drawn.log_probs_NT[~dead_NT] < 0).all() and (entropy_NT[~dead_NT] > 0).all()
    assert drawn.tokens_NT[dead_NT].any()  # raw, not canonical
    torch.manual_seed(99)
    assert (policy.sample(50, np.random.default_rng(5)).tokens_NT == drawn.tokens_NT).all()
    assert (policy.sample(50, np.random.default_rng(6)).tokens_NT != drawn.tokens_NT).any()
    torch.set_rng_state(before)


def test_initial_parameters_are_uniform_small_seeded_and_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state().clone()
    a, b, c = (LstmPolicy(ToySpace(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert difference(a, b) == 0 < difference(a, c)
    values = torch.cat([p.detach().ravel() for p in a.parameters()])
    assert -0.1 <= values.min() < -0.0999 and 0.0999 < values.max() <= 0.1
    assert values.std().item() == pytest.approx(0.2 / 12 ** 0.5, rel=0.01)
    assert len(a.embedding.weight) == 3 + 4 + 2  # one table for each of depth, width and kernel


def test_unusable_rows_and_rules_are_named() -> None:
    falling = np.array([[0, 1, 1, 1], [1, 0, 2, 2]], dtype=np.int8)
    with pytest.raises(SpaceError, match=r"token 0 at position 1 \(d1\) of \[1, 0, 2, 2\] is not valid"):
        LstmPolicy(RisingSpace()).evaluate(falling)
    with pytest.raises(SpaceError, match=r"allows no token after the prefix \[\d, \d\]"):
        LstmPolicy(DeadEndSpace()).sample(1, np.random.default_rng(0))


def test_inverse_cdf_never_hits_probability_zero() -> None:
    p = np.array([[0.0, 0.5, 0.0, 0.5 - 1e-12, 0.0]])  # short of one by rounding
    uniform = [0.0, 0.49, 0.51, 1 - 2 ** -53]
    assert [inverse_cdf(p, np.array([u]))[0] for u in uniform] == [1, 1, 3, 3]


# --- loss ------------------------------------------------------------------------------------------------------------

def by_hand(policy: LstmPolicy, tokens_NT: Tokens, old_NT: NDArray[np.float64], advantages_N: NDArray[np.float64],
            weights_N: NDArray[np.float64], entropy_weight: float, clip: float = 0.2) -> torch.Tensor:
    """The loss of section 3, one term at a time."""
    log_probs, entropy = policy(torch.from_numpy(tokens_NT), *policy.masks(tokens_NT))
    terms, bonus = [], []
    for n, live_T in enumerate(policy.space.live_mask(tokens_NT)):
        for t in np.flatnonzero(live_T):
            r = torch.exp(log_probs[n, t] - old_NT[n, t])
            a = float(advantages_N[n])
            clipped = min(max(r.item(), 1 - clip), 1 + clip)
            unclipped_is_less = r.item() * a <= clipped * a
            terms.append(float(weights_N[n]) * (r * a if unclipped_is_less else torch.tensor(clipped * a)))
        bonus.append(entropy[n].sum())
    return -torch.stack(terms).mean() - entropy_weight * torch.stack(bonus).mean()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_that_was_all_but_impossible_leaves_the_gradient_finite(advantage: float) -> None:
    log_probs_NT = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    batch = {"live_share": torch.full((1, 2), 0.5), "log_probs_old": torch.tensor([[-150.0, -0.5]]),
             "advantages": torch.tensor([advantage]), "weights": torch.ones(1), "row_share": torch.ones(1),
             "entropy_weight": torch.tensor(0.0)}
    loss, figures = ppo_loss(log_probs_NT, torch.zeros(1, 2), batch, clip=0.2)
    loss.backward()
    assert log_probs_NT.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(log_probs_NT.grad).all() and torch.isfinite(figures["kl"])
    assert log_probs_NT.grad[0, 1].item() == pytest.approx(-0.5 * advantage), "the other token teaches as before"


@pytest.mark.parametrize("ratio, advantage, term", [(1.3, 0.5, 0.6), (0.7, -0.5, -0.4), (1.3, -0.5, -0.65),
                                                    (0.7, 0.5, 0.35), (1.1, 0.5, 0.55)])
def test_clipped_terms_of_the_specification(ratio: float, advantage: float, term: float) -> None:
    assert clipped_objective(torch.tensor(ratio), torch.tensor(advantage), 0.2).item() == pytest.approx(term)


def stale(space: SearchSpace) -> tuple[LstmPolicy, dict[str, Any], NDArray[np.float64]]:
    """A policy, an update for it, and the log-probabilities of another policy, so that many ratios are clipped."""
    policy = opinionated(space)
    update = one_update(space, policy)
    return policy, update, LstmPolicy(space, hidden=8).evaluate(update["tokens_NT"])[0]


def test_loss_and_gradient_equal_the_formula_written_out() -> None:
    policy, update, old_NT = stale(ToySpace())
    batch = ppo_batch(policy, **update, log_probs_old_NT=old_NT)
    loss, figures = ppo_loss(*policy(batch["tokens"], batch["live"], batch["valid"]), batch, 0.2)
    expected = by_hand(policy, old_NT=old_NT, **update)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, list(policy.parameters())),
                            torch.autograd.grad(expected, list(policy.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    log_ratio = (policy.evaluate(update["tokens_NT"])[0] - old_NT)[policy.space.live_mask(update["tokens_NT"])]
    ratio = np.exp(log_ratio)
    assert 0.2 < figures["clip_share"].item() < 1
    assert figures["clip_share"].item() == pytest.approx((np.abs(ratio - 1) > 0.2).mean(), abs=1e-6)
    assert figures["kl"].item() == pytest.approx((ratio - 1 - log_ratio).mean(), rel=1e-4)


@pytest.mark.parametrize("rows, parts", [(21, 2), (21, 4), (1, 3)])
def test_parts_of_a_batch_average_to_the_loss_of_the_whole(rows: int, parts: int) -> None:
    policy, update, old_NT = stale(ToySpace())
    update = {k: v[:rows] if isinstance(v, np.ndarray) else v for k, v in update.items()}
    batch = ppo_batch(policy, **update, log_probs_old_NT=old_NT[:rows])

    def figures_of(part: dict[str, torch.Tensor]) -> dict[str, float]:
        figures = ppo_loss(*policy(part["tokens"], part["live"], part["valid"]), part, 0.2)[1]
        return {name: value.item() for name, value in figures.items()}

    each = [figures_of(part) for part in shards(batch, parts)]
    assert len(each) == parts
    for name, value in figures_of(batch).items():
        assert np.mean([figures[name] for figures in each]) == pytest.approx(value, abs=1e-6), name


def test_dead_positions_have_no_gradient_and_no_influence() -> None:
    space = ToySpace()
    policy = opinionated(space)
    rng = np.random.default_rng(0)
    tokens_NT = policy.sample(12, rng).tokens_NT
    tokens_NT[:, 0] = 0  # one layer: positions 3 to 6 are dead
    update = {"advantages_N": rng.normal(size=12), "weights_N": np.ones(12), "entropy_weight": 0.1}
    gradients = []
    for rows in (tokens_NT, space.canonical(tokens_NT)):
        assert rows is tokens_NT or (rows != tokens_NT).any()
        batch = ppo_batch(policy, rows, **update)
        loss = ppo_loss(*policy(batch["tokens"], batch["live"], batch["valid"]), batch, 0.2)[0]
        gradients.append(torch.autograd.grad(loss, [policy.head_weight, policy.lstm.weight_hh_l0]))
    assert not gradients[0][0][3:].any() and gradients[0][0][:3].any()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- learner ---------------------------------------------------------------------------------------------------------

def gradient(space: SearchSpace, weights_N: NDArray[np.float64]) -> dict[str, torch.Tensor]:
    """That of one step without clipping, read from Adam's first moment, which is a tenth of it."""
    learner = PpoLearner(space, PpoSettings(epochs=1, gradient_norm=1e9, hidden=8))
    learner.policy.load_state_dict(opinionated(space).state_dict())
    update = one_update(space, learner.policy)
    learner.update(**(update | {"weights_N": weights_N, "entropy_weight": 0.0}))
    state = learner.state_dict()
    learner.close()
    return {name: value * 10 for name, value in state.items() if name.startswith("adam.exp_avg.")}


def test_the_step_of_the_learner_is_along_the_gradient_written_out_and_linear_in_the_weights() -> None:
    space = ToySpace()
    policy = opinionated(space)
    update = one_update(space, policy) | {"entropy_weight": 0.0}
    old_NT = policy.evaluate(update["tokens_NT"])[0]
    expected = torch.autograd.grad(by_hand(policy, old_NT=old_NT, **update), list(policy.parameters()))
    weights_N = update["weights_N"]
    whole = gradient(space, weights_N)
    for (name, _), theirs in zip(policy.named_parameters(), expected, strict=True):
        torch.testing.assert_close(whole[f"adam.exp_avg.{name}"], theirs, atol=1e-6, rtol=1e-4)
    first = np.where(np.arange(len(weights_N)) < 7, weights_N, 0)
    parts = gradient(space, 3 * first), gradient(space, weights_N - first)
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] / 3 + parts[1][name], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("space", [ToySpace(), RisingSpace()], ids=lambda space: space.space_id)
def test_rllib_and_plain_torch_learn_the_same(space: SearchSpace) -> None:
    settings = PpoSettings(learning_rate=3e-3, hidden=20, gradient_norm=0.02)
    ours, twin, peer = (make(space, settings, 4) for make in (PpoLearner, PpoLearner, PlainPpo))
    untouched = LstmPolicy(space, hidden=20, seed=4)
    for i in range(5):
        update = one_update(space, ours.policy, seed=i)
        if i == 3:
            update["log_probs_old_NT"] = untouched.evaluate(update["tokens_NT"])[0]
        figures = ours.update(**update)
        assert figures == twin.update(**update)
        assert figures == pytest.approx(peer.update(**update), abs=1e-5)
        assert figures["gradient_norm"] > settings.gradient_norm  # the gradient was clipped
        assert difference(ours.policy, twin.policy) == 0
        assert difference(ours.policy, peer.policy) < 1e-6 < 1e-3 < difference(ours.policy, untouched)


def test_a_restored_learner_goes_on_exactly() -> None:
    space, settings = ToySpace(), PpoSettings(learning_rate=3e-3, hidden=8)
    first = PpoLearner(space, settings, seed=0)
    for i in range(2):
        first.update(**one_update(space, first.policy, seed=i))
    state = first.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    second = PpoLearner(space, settings, seed=1)
    second.update(**one_update(space, second.policy, seed=7))
    second.load_state_dict(state)
    assert difference(first.policy, second.policy) == 0
    snapshot = second.snapshot()
    update = one_update(space, first.policy, seed=3)
    assert first.update(**update) == second.update(**update)
    assert difference(first.policy, second.policy) == 0
    assert all(torch.equal(kept[name], state[name]) for name in state)  # copies, not views of what changes
    copy = LstmPolicy(space, hidden=8)
    copy.load_state_dict(snapshot)
    assert 0 < difference(copy, second.policy) < 0.1
    larger = PpoLearner(space, PpoSettings(hidden=9), seed=0)
    before = larger.snapshot()
    with pytest.raises(StoreError, match=r"does not fit search space toy: .* expected .*9"):
        larger.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in larger.snapshot().items())


def test_ppo_finds_the_rewarded_architectures() -> None:
    space = ToySpace()
    learner = PpoLearner(space, PpoSettings(learning_rate=3e-3))
    rng, mean = np.random.default_rng(0), []
    for _ in range(40):
        tokens_NT = learner.policy.sample(20, rng).tokens_NT
        reward_N = (tokens_NT[:, 0] == 2) + (tokens_NT[:, [1, 3, 5]] == 3).sum(axis=1)  # at most 4
        mean.append(reward_N.mean())
        advantages_N = (reward_N - np.mean(mean[-5:])) / (reward_N.std() + 1e-3)
        learner.update(tokens_NT, advantages_N, np.ones(20), 1e-3)
    assert mean[0] < 1.8 and np.mean(mean[-5:]) > 3.5, mean


def test_learning_in_the_driver_needs_no_ray_and_prints_nothing() -> None:
    script = ("import sys, numpy as np\n"
              "from orchestrator.controllers.fnas.learner import PpoLearner, PpoSettings\n"
              "from tests.orchestrator.controllers.toy import ToySpace\n"
              "assert 'ray.rllib' not in sys.modules\n"
              "learner = PpoLearner(ToySpace(), PpoSettings())\n"
              "tokens = learner.policy.sample(4, np.random.default_rng(0)).tokens_NT\n"
              "learner.update(tokens, np.ones(4), np.ones(4), 0.0)\n"
              "learner.close(); learner.close()\n"
              "import ray; assert not ray.is_initialized()\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[3], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- learners on other processes -------------------------------------------------------------------------------------

@pytest.mark.soak
def test_two_learners_equal_one_and_survive_the_death_of_either(ray_local: None) -> None:
    import ray

    space, settings = ToySpace(), PpoSettings(learning_rate=3e-3, hidden=20, num_learners=2)
    before = ray.available_resources()["CPU"]
    learner, peer = PpoLearner(space, settings, seed=4), PlainPpo(space, settings, seed=4)
    for i, rows in enumerate((21, 20, 1)):  # the last one leaves a learner without a row
        update = one_update(space, learner.policy, seed=i, rows=rows)
        figures = learner.update(**update)
        assert figures == pytest.approx(peer.update(**update), abs=1e-5)
        assert difference(learner.policy, peer.policy) < 1e-5
        if i == 1:
            ray.kill(learner._group._workers[1])
    state = learner.state_dict()
    with pytest.raises(StoreError, match="does not fit"):
        learner.load_state_dict({name: value for name, value in state.items() if name != "policy.start"})
    update = one_update(space, learner.policy, seed=9)
    once = learner.update(**update)
    learner.load_state_dict(state)
    assert learner.update(**update) == pytest.approx(once, abs=1e-6)
    learner.close()
    for _ in range(100):
        if ray.available_resources().get("CPU", 0) >= before:
            break
        ray.wait([ray.remote(num_cpus=0)(lambda: None).remote()], timeout=0.2)
    assert ray.available_resources()["CPU"] >= before


def test_learners_without_room_are_refused(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.controllers.fnas.learner.START_TIME_OUT_S", 0.5)
    learner = PpoLearner(ToySpace(), PpoSettings(num_learners=64))
    with pytest.raises(ClusterError, match="64 PPO learners need 64 free CPUs"):
        learner.update(**one_update(ToySpace(), learner.policy))


def test_what_was_learnt_is_read_and_written_without_learners() -> None:
    """There is no room for 64 of them: they must not be asked for before the first update."""
    space, settings = ToySpace(), PpoSettings(learning_rate=3e-3, hidden=8)
    first = PpoLearner(space, settings, seed=0)
    first.update(**one_update(space, first.policy))
    restored = PpoLearner(space, PpoSettings(learning_rate=3e-3, hidden=8, num_learners=64), seed=1)
    restored.load_state_dict(first.state_dict())
    assert difference(first.policy, restored.policy) == 0
    state = restored.state_dict()
    assert state.keys() == first.state_dict().keys() and any(name.startswith("adam.exp_avg.") for name in state)
    with pytest.raises(StoreError, match="does not fit"):
        restored.load_state_dict({name: value for name, value in state.items() if name != "policy.start"})
    assert restored._group is None
    second = PpoLearner(space, settings, seed=1)  # the first update starts from what was loaded
    second.load_state_dict(state)
    update = one_update(space, first.policy, seed=3)
    assert first.update(**update) == second.update(**update) and difference(first.policy, second.policy) == 0
