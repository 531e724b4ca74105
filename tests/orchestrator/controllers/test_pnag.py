"""The generator and the whole controller, on a toy space whose optima are enumerated."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

from orchestrator.controllers.catalogue import check_controller_options, make_controller
from orchestrator.controllers.conformance import check_controller
from orchestrator.controllers.controller import EarlierRun, Observation, Task
from orchestrator.controllers.pnag.budgets import TrainingBudgets
from orchestrator.controllers.pnag.controller import Pnag
from orchestrator.controllers.pnag.generator import Generator
from orchestrator.controllers.pnag.policy_gradient import train_generator
from orchestrator.controllers.pnag.settings import GeneratorSettings
from searchspaces.errors import ConfigError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens
from tests.orchestrator.controllers.toy import ToyLatency, ToySpace, toy_accuracy, toy_trials

SPACE = ToySpace()
BUDGETS = (3.0, 5.0, 8.0, 11.0)
SMALL: dict[str, Any] = {"generator": {"updates": 250, "round_updates": 20},
                         "evaluator": {"hidden": 64, "epochs": 15, "pseudo_triplets": 200},
                         "posterior": {"trees": 30}, "collection": {"candidates": 300}}


def task(budgets: tuple[float, ...] = BUDGETS) -> Task:
    return Task(budgets, 60, 0, ToyLatency(SPACE))


def pnag(budgets: tuple[float, ...] = BUDGETS, training_budgets: int = 4, **changes: Any) -> Pnag:
    options = SMALL | {"budgets": training_budgets} | changes
    controller = make_controller("pnag", SPACE, task(budgets=budgets), options)
    assert isinstance(controller, Pnag)
    return controller


def searched(controller: Pnag, evaluations: int) -> list[Observation]:
    log: list[Observation] = []
    while len(log) < evaluations:
        proposals = controller.propose(min(5, evaluations - len(log)))
        assert proposals
        trials = toy_trials(SPACE, np.stack([p.tokens for p in proposals]))
        controller.observe(trials)
        log += trials
    return log


@pytest.fixture(scope="module")
def trained() -> tuple[Pnag, list[Observation]]:
    controller = pnag()
    log = searched(controller, 60)
    controller.learn()
    return controller, log


def optimum(budget_ms: float) -> float:
    rows = SPACE.everything()
    return float(toy_accuracy(SPACE, rows)[ToyLatency(SPACE).predict(rows) <= budget_ms].max())


def test_finds_near_optima_for_seen_and_unseen_budgets(trained: tuple[Pnag, list[Observation]]) -> None:
    gaps = []
    for budget_ms in (*BUDGETS, 4.2, 6.6, 9.7):
        answer = trained[0].generate([budget_ms])[0][0]
        assert answer.feasible and not answer.clamped
        assert ToyLatency(SPACE).predict(answer.tokens[None])[0] <= budget_ms
        gaps.append(optimum(budget_ms) - toy_accuracy(SPACE, answer.tokens[None])[0])
    assert max(gaps) < 0.06 and np.mean(gaps) < 0.02  # accuracies range from 0.456 to 0.928


def test_generator_itself_obeys_unseen_budgets(trained: tuple[Pnag, list[Observation]]) -> None:
    """Most samples of pi(.|B) are feasible, and larger budgets give larger networks."""
    budgets_ms = (4.2, 6.6, 9.7)
    latencies = [ToyLatency(SPACE).predict(trained[0].samples(budget_ms, 200)) for budget_ms in budgets_ms]
    feasible = [np.mean(latency_N <= budget_ms) for latency_N, budget_ms in zip(latencies, budgets_ms)]
    assert min(feasible) > 0.5 and np.mean(feasible) > 0.8
    assert latencies[0].mean() < latencies[1].mean() < latencies[2].mean()


def test_single_training_budget_is_the_midpoint_and_answers_it() -> None:
    controller = pnag(budgets=(4.0, 10.0), training_budgets=1)
    controller.observe(toy_trials(SPACE, SPACE.sample_uniform(np.random.default_rng(0), 80)))
    controller.learn()
    assert controller.learner_for(5.0).budgets.values_ms == (7.0,)
    assert np.mean(ToyLatency(SPACE).predict(controller.samples(7.0, 100)) <= 7.0) > 0.7


def test_independent_learners_have_one_budget_each() -> None:
    controller = pnag(joint=False, generator={"updates": 5})
    controller.observe(toy_trials(SPACE, SPACE.sample_uniform(np.random.default_rng(0), 40)))
    controller.learn()
    assert [controller.learner_for(b).budgets.values_ms for b in (2.0, 5.4, 11.0)] == [(3.0,), (5.0,), (11.0,)]


def test_rule_without_accuracy_constraint_collapses_to_the_cheapest() -> None:
    controller = pnag(reward="cost_only")
    controller.observe(toy_trials(SPACE, SPACE.sample_uniform(np.random.default_rng(0), 80)))
    assert ToyLatency(SPACE).predict(controller.samples(11.0, 50)).mean() < 3.0


def test_infeasible_and_clamped_budgets_say_so(trained: tuple[Pnag, list[Observation]]) -> None:
    too_small, too_large = trained[0].generate([0.1, 100.0])
    assert not too_small[0].feasible and too_small[0].clamped and too_small[0].latency_ms > 0.1
    assert too_large[0].feasible and too_large[0].clamped


def test_nothing_over_the_largest_budget_is_proposed() -> None:
    controller = pnag(budgets=(3.0, 5.0), collection={"candidates": 300, "warmup": 10, "batch": 5})
    latencies = [trial.latency_ms for trial in searched(controller, 25)]
    assert max(latencies) <= 5.0


def test_state_survives_safetensors(trained: tuple[Pnag, list[Observation]]) -> None:
    controller, _ = trained
    state = controller.state_dict()
    arrays = {k: torch.as_tensor(v).contiguous() for k, v in state.items() if not isinstance(v, int | float | str)}
    restored = pnag()
    restored.load_state_dict(load(save(arrays)) | {k: v for k, v in state.items() if k not in arrays})
    for first, second in zip(controller.generate([4.2, 7.0], 4), restored.generate([4.2, 7.0], 4), strict=True):
        assert [(a.tokens.tolist(), a.score, a.observed) for a in first] == [
            (b.tokens.tolist(), b.score, b.observed) for b in second]


def test_replay_gives_the_same_next_proposals(trained: tuple[Pnag, list[Observation]]) -> None:
    log = trained[1]
    for length in (0, 7, 20, 33, 60):
        original, replayed = pnag(), pnag()
        for start in range(0, length, 5):
            original.observe(log[start:min(start + 5, length)])
        replayed.observe(log[:length])
        assert [p.tokens.tolist() for p in original.propose(6)] == [p.tokens.tolist() for p in replayed.propose(6)]


def test_failed_trials_are_never_proposed_again() -> None:
    controller = pnag()
    first = controller.propose(8)
    controller.observe([Observation(p.tokens, math.nan, math.nan, "failed") for p in first])
    later = controller.propose(40)
    assert not {p.tokens.tobytes() for p in first} & {p.tokens.tobytes() for p in later}
    assert controller.generate([5.0])[0][0].tokens.shape == (7,)  # nothing succeeded, still an answer


def other_task(tokens_NT: Tokens) -> NDArray[np.float64]:
    """What another dataset says: the toy's accuracies on another scale, with errors of its own."""
    noise_N = np.array([hash_share(row) for row in tokens_NT])
    return np.clip(0.1 + 0.6 * toy_accuracy(SPACE, tokens_NT) ** 2 + 0.01 * noise_N, 0, 1)


def hash_share(tokens_T: Tokens) -> float:
    return float(np.random.default_rng(tokens_T.astype(np.int64)).normal())


QUICK: dict[str, Any] = {"generator": {"updates": 30, "round_updates": 5}, "posterior": {"trees": 10},
                         "evaluator": {"hidden": 16, "epochs": 2, "least_steps": 20, "pseudo_triplets": 50}}


def warm_started(earlier: EarlierRun) -> Pnag:
    controller = make_controller("pnag", SPACE, Task(BUDGETS, 30, 0, ToyLatency(SPACE), (earlier,)), SMALL | QUICK | {
        "budgets": 4})
    assert isinstance(controller, Pnag)
    return controller


def test_a_search_starts_from_earlier_runs_of_another_task() -> None:
    """Half of a start half as long is promising; the rest replays; the state answers without the earlier run."""
    rows = SPACE.everything()[::3]
    earlier = EarlierRun("first", False, rows, other_task(rows), ToyLatency(SPACE).predict(rows))
    controller = warm_started(earlier)
    start = controller.propose(10)
    assert len(start) == 10 and len(controller.propose(1)) == 1, "the start is ten architectures, then some to spare"
    for proposal in start[::2]:
        assert proposal.budget_ms is not None
        under = rows[ToyLatency(SPACE).predict(rows) <= proposal.budget_ms]
        assert toy_accuracy(SPACE, proposal.tokens[None])[0] > np.quantile(toy_accuracy(SPACE, under), 0.8)
    assert all(proposal.budget_ms is None for proposal in start[1::2])
    log = toy_trials(SPACE, np.stack([p.tokens for p in start]))
    controller, again = warm_started(earlier), warm_started(earlier)
    controller.observe(log)
    log += searched(controller, 10)
    again.observe(log)
    assert [p.tokens.tolist() for p in again.propose(5)] == [p.tokens.tolist() for p in controller.propose(5)]
    assert controller.metrics()["agreement_with_earlier"] > 0.7
    answers = controller.generate(BUDGETS)
    for (answer,), budget_ms in zip(answers, BUDGETS):
        assert answer.accuracy >= optimum(budget_ms) - 0.03
    restored = pnag(**QUICK)
    state = controller.state_dict()
    arrays = {k: torch.as_tensor(v).contiguous() for k, v in state.items() if not isinstance(v, int | float | str)}
    restored.load_state_dict(load(save(arrays)) | {k: v for k, v in state.items() if k not in arrays})
    assert [a[0].score for a in restored.generate(BUDGETS)] == [a[0].score for a in answers]


def test_trials_of_the_same_task_are_trials() -> None:
    """No random start; nothing known is proposed again; an answer nobody evaluated in this run is not an observed one.
    """
    rows = SPACE.everything()[::4]
    trials = toy_trials(SPACE, rows)
    earlier = EarlierRun("first", True, rows, toy_accuracy(SPACE, rows), ToyLatency(SPACE).predict(rows))
    controller = warm_started(earlier)
    proposals = controller.propose(5)
    assert all(proposal.budget_ms is not None for proposal in proposals)
    assert not {p.tokens.tobytes() for p in proposals} & {t.tokens.tobytes() for t in trials}
    controller.observe(toy_trials(SPACE, np.stack([p.tokens for p in proposals])))
    own = {p.tokens.tobytes() for p in proposals}
    assert all(answer.observed == (answer.tokens.tobytes() in own)
               for answers in controller.generate(BUDGETS, 5) for answer in answers)


def test_pending_proposals_keep_other_workers_busy() -> None:
    """While proposals are pending the queue goes on past its round; with none pending it waits for what is observed."""
    controller = pnag()
    warmup = controller.settings.collection.warmup
    assert len(controller.propose(warmup + 5)) == warmup
    assert 0 < len(controller.propose(5)) <= 5


QUICK: dict[str, Any] = {"evaluator": {"epochs": 1, "hidden": 16}, "generator": {"updates": 3}}


class SkipsAreFast:
    """Latency of cells: almost nothing but their convolutions, so that uniform cells are all but evenly spread."""

    def predict(self, tokens_NT: NDArray[np.int8]) -> NDArray[np.float64]:
        return 0.5 + (tokens_NT == 2).sum(axis=1) + 1.5 * (tokens_NT == 3).sum(axis=1)


@pytest.mark.parametrize("variant", ["printed", "released", "specified"])
def test_triplets_of_the_paper_are_plain_uniform_samples(variant: str) -> None:
    """Every operation at every place equally often, whatever is known of latencies: chi-square of 24 degrees."""
    space, budgets = NasBench201(), (1.0, 4.0)
    options = QUICK | {"variant": variant, "collection": {"warmup": 600, "batch": 300}}
    controller = make_controller("pnag", space, Task(budgets, 900, 0, SkipsAreFast()), options)
    rows = []
    for count in (600, 300):
        rows.append(np.stack([proposal.tokens for proposal in controller.propose(count)]))
        assert len(rows[-1]) == count
        controller.observe([Observation(row, 0.5, 2.0) for row in rows[-1]])
    for rows_NT in rows:
        counts_TV = np.stack([np.bincount(column, minlength=5) for column in rows_NT.T])
        expected = len(rows_NT) / 5
        assert ((counts_TV - expected) ** 2 / expected).sum() < 51.2  # 1 in 1,000
    assert len(np.unique(np.concatenate(rows), axis=0)) == 900


def test_answers_by_the_evaluator_are_draws_ranked_by_it() -> None:
    controller = pnag(answer="evaluator")
    controller.observe(toy_trials(SPACE, SPACE.sample_uniform(np.random.default_rng(0), 80)))
    too_small, answers = controller.generate([0.1, 7.0], 3)
    learner = controller.learner_for(7.0)
    for budget_ms, found in ((0.1, too_small), (7.0, answers)):
        drawn_NT = np.unique(learner.sample([budget_ms], controller.settings.generate_samples, 0)[0], axis=0)
        latency_N = ToyLatency(SPACE).predict(drawn_NT)
        if budget_ms < latency_N.min():
            best_NT = drawn_NT[latency_N == latency_N.min()]
            assert len(found) == 1 and not found[0].feasible
            assert found[0].tokens.tolist() in best_NT.tolist()
            continue
        score_N = learner.scores(drawn_NT, np.full(len(drawn_NT), budget_ms))[latency_N <= budget_ms]
        assert [a.score for a in found] == pytest.approx(np.sort(score_N)[::-1][:3], abs=1e-6)
        assert all(a.feasible and a.tokens.tolist() in drawn_NT.tolist() for a in found)


@pytest.mark.parametrize("variant", ["ours", "printed"])
def test_range_of_the_training_budgets(variant: str) -> None:
    trials = toy_trials(SPACE, SPACE.sample_uniform(np.random.default_rng(0), 80))
    percentiles = np.percentile([trial.latency_ms for trial in trials], [5, 95])
    usual = BUDGETS if variant == "ours" else percentiles
    for options, expected in (({}, usual), ({"range_ms": (2.0, 9.0)}, (2.0, 9.0)), ({"range_from": "task"}, BUDGETS)):
        controller = pnag(variant=variant, **QUICK, **options)
        controller.observe(trials)
        controller.learn()
        values = controller.learner_for(5.0).budgets.values_ms
        assert (values[0], values[-1]) == pytest.approx((expected[0], expected[-1]))


@pytest.mark.parametrize(("changes", "expected_ms"), [
    ({"reward": "multiplicative", "reward_exponent": -1.0}, "lowest accuracy per ms"),
    ({"reward": "multiplicative", "reward_exponent": -1.0, "reward_pays_below_budget": False}, "best under the budget"),
    ({"reward": "absolute", "reward_coefficient": 1.0}, "at the budget"),
])
def test_hand_written_rewards_are_what_the_generator_maximises(changes: dict[str, Any], expected_ms: str) -> None:
    """Which architecture the formula likes best is enumerated; the formulas like very different ones."""
    budget_ms, everything = 6.0, SPACE.everything()
    latency_N, accuracy_N = ToyLatency(SPACE).predict(everything), toy_accuracy(SPACE, everything)
    if changes["reward"] == "absolute":
        reward_N = accuracy_N - np.abs(latency_N / budget_ms - 1)
    elif changes.get("reward_pays_below_budget", True):
        reward_N = accuracy_N * budget_ms / latency_N
    else:
        reward_N = accuracy_N * budget_ms / np.maximum(latency_N, budget_ms)
    controller = pnag(training_budgets=1, range_ms=(budget_ms, budget_ms), **changes)
    controller.observe(toy_trials(SPACE, everything[np.random.default_rng(0).permutation(len(everything))[:300]]))
    samples = controller.samples(budget_ms, 64)
    mean_ms, best_ms = ToyLatency(SPACE).predict(samples).mean(), float(latency_N[reward_N.argmax()])
    assert mean_ms == pytest.approx(best_ms, rel=0.12), expected_ms
    if expected_ms == "lowest accuracy per ms":
        assert mean_ms < 0.4 * budget_ms


def test_training_stops_without_improvement_where_patience_is_set() -> None:
    def updates(patience: int | None) -> int:
        settings = GeneratorSettings(patience=patience)
        return train_generator(SPACE, TrainingBudgets((3.0, 5.0)), settings, lambda rows, _: np.zeros(len(rows)), 25,
                               torch.Generator().manual_seed(0)).updates

    assert (updates(None), updates(7), updates(30)) == (25, 8, 25)


@pytest.mark.parametrize("every_step", [True, False])
def test_budget_at_every_step_reaches_a_cell_that_remembers_nothing(every_step: bool) -> None:
    """With the first token fixed and the memory cut, the budget can only matter where it is put in again."""
    torch.manual_seed(0)
    generator = Generator(SPACE, 2, budget_every_step=every_step)
    with torch.no_grad():
        generator.budget_table.mul_(30)
        generator.cell.weight_hh.zero_()
        generator.cell.bias_ih[generator.cell.hidden_size:2 * generator.cell.hidden_size] = -50.0  # forget
        generator.heads[0].bias.copy_(torch.tensor([0.0, 0.0, 50.0]))  # depth 3 always
        entropies = [generator.draw(torch.eye(2)[k:k + 1], torch.Generator().manual_seed(0)).entropy_N for k in (0, 1)]
    assert bool(torch.isclose(*entropies, atol=1e-6)) != every_step


@pytest.mark.parametrize("mask", [True, False])
def test_dead_tokens_have_no_gradient(mask: bool) -> None:
    """With depth 1 forced, only the depth head and the first layer's tokens may matter."""
    torch.manual_seed(0)
    generator = Generator(SPACE, 2, mask_dead_tokens=mask)
    with torch.no_grad():
        generator.heads[0].bias.copy_(torch.tensor([50.0, 0.0, 0.0]))  # depth 1 always
    inputs: list[torch.Tensor] = []
    hook = generator.heads[1].register_forward_hook(lambda _m, _i, out: (out.retain_grad(), inputs.append(out))[1])
    draw = generator.draw(torch.eye(2).repeat(4, 1), torch.Generator().manual_seed(0))
    hook.remove()
    (draw.log_prob_N + draw.entropy_N).sum().backward()
    gradients = [float(out.grad.abs().sum()) if out.grad is not None else 0.0 for out in inputs]
    assert gradients[0] > 0  # the live width
    assert (max(gradients[1:]) == 0) == mask
    assert (draw.tokens_NT[:, 3:] == 0).all()


def test_log_probability_is_that_of_the_sampled_distribution() -> None:
    """Frequencies of 20,000 draws match exp(log_prob)."""
    torch.manual_seed(3)
    generator = Generator(SPACE, 1)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(8)
        draw = generator.draw(torch.ones(20_000, 1), torch.Generator().manual_seed(0))
    rows, first, counts = np.unique(draw.tokens_NT, axis=0, return_index=True, return_counts=True)
    top = np.argsort(-counts)[:5]
    expected = draw.log_prob_N.numpy()[first[top]]
    assert len(rows) > 50 and np.allclose(counts[top] / 20_000, np.exp(expected), atol=0.01)


@pytest.mark.parametrize("name", ["pnag", "random"])
def test_conformance(name: str) -> None:
    options = {"generator": {"updates": 20, "round_updates": 3}, "evaluator": {"epochs": 2, "hidden": 32},
               "posterior": {"trees": 10}, "collection": {"candidates": 200}} if name == "pnag" else {}
    assert check_controller(name, options) == []


def test_conformance_finds_a_controller_that_depends_on_its_own_past() -> None:
    problems = check_controller("tests.orchestrator.controllers.test_pnag:Forgetful")
    assert any("observed already" in problem for problem in problems)


class Forgetful(Pnag):
    """Proposes what it knows: broken on purpose."""

    def propose(self, n: int) -> list[Any]:
        from orchestrator.controllers.controller import Proposal
        return [Proposal(np.zeros(len(self.space.choices), dtype=np.int8))]

    def learn(self) -> None:
        self._learnt_from = len(self._trials)


@pytest.mark.parametrize(("options", "message"), [
    ({"budgetz": 3}, "did you mean 'budgets'"), ({"generator": {"update": 3}}, "did you mean 'updates'"),
    ({"budgets": 0}, "greater than or equal to 1"), ({"reward": "best"}, "'best'")])
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_controller_options("pnag", options)
    assert "\n" not in str(error.value)


def test_unknown_controller_names_the_closest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pnag'"):
        check_controller_options("pnagg", {})


def test_random_search_is_answered_by_its_best_trial() -> None:
    controller = make_controller("random", SPACE, task(), {})
    trials = toy_trials(SPACE, np.stack([p.tokens for p in controller.propose(40)]))
    controller.observe(trials)
    best = max((t for t in trials if t.latency_ms <= 5.0), key=lambda t: t.accuracy)
    assert controller.generate([5.0])[0][0].accuracy == best.accuracy
