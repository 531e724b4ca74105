"""First stage: measure the device, learn to predict latency, and refuse budgets that no architecture can meet.

Nothing is trained yet, so a wrong budget costs seconds. The fastest and the slowest architecture are measured first,
then networks spread between them until the predictor's held-out error is near the noise of the measurements. What an
earlier run measured on the same device counts as measured.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from actors.latency.result import LatencyResult
from orchestrator.controllers.controller import LatencyModel
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.prediction.transfer import choose_to_measure
from orchestrator.record.goals import make_goals, save_goals, target_state, update_target_state
from orchestrator.record.records import latency_result
from orchestrator.services.context import RunContext, RunTarget
from orchestrator.services.evaluation import measure_architectures
from orchestrator.services.states import save_state, state_name
from orchestrator.services.warmstart import earlier_devices, earlier_latencies
from searchspaces.errors import BudgetError
from searchspaces.space import SearchSpace, Tokens

LEAST_WITH_HELP = 10  # networks measured before the first predictor, where another device was measured before
GROWTH = 25  # networks measured between two fits of the predictor
GOOD_ENOUGH = 1.3  # held-out error over noise floor at which measuring more does not pay (latency specification 6)


def measure(run: RunContext) -> None:
    for target in run.targets:
        measure_target(run, target)
    goals = make_goals(run.config, {target.label: budgets(run, target) for target in run.targets})
    run.metrics.set_reference(max(run.targets[0].measured_ms.values()))
    save_goals(run.store, goals)


def measure_target(run: RunContext, target: RunTarget) -> None:
    """Until the target's predictor is good enough, or `latency.maximum` networks. Refuses hopeless budgets early."""
    settings, wanted_ms = run.config.latency, run.config.budgets.of(target.label).values_ms
    title = "measure" if len(run.targets) == 1 else f"measure {target.label}"
    run.progress.stage(title, total=settings.maximum, done=len(target.measured_ms))
    pool = run.services.latency(target.label)
    target_id = pool.identity().target_id
    update_target_state(run.store, target.label, reference_ms=pool.reference_ms(), target_id=target_id,
                        target=asdict(pool.identity()))
    known = known_networks(run, target)
    measured = [row for row in run.store.latency.read().to_pylist() if row["target_id"] == target_id]
    pool.preload(known + [latency_result(row) for row in measured])
    others = other_devices(run, target)
    sample_NT = spread_sample(run.space, settings.maximum, run.config.seed)
    plan_NT, first = with_known(telling_first(run, sample_NT, list(others.values())),
                                [result.tokens_T for result in known])
    if known:
        run.progress.stage(title, total=len(plan_NT), done=len(target.measured_ms))
    measure_architectures(run, target, plan_NT[:2], run.progress.advance)
    check_reachable(wanted_ms, run.space, target.measured_ms)
    initial = max(LEAST_WITH_HELP, settings.initial // 2) if others else settings.initial
    count = max(min(initial, settings.maximum), first)
    while True:
        measure_architectures(run, target, plan_NT[:count], run.progress.advance)
        target.predictor = fit_predictor(run, target, list(others.values()))
        good = target.predictor.heldout_error < GOOD_ENOUGH * target.predictor.noise_floor
        if good or count >= len(plan_NT):
            break
        count = min(count + GROWTH, len(plan_NT))
    save_predictor(run, target)
    check_reachable(wanted_ms, run.space, target.measured_ms)
    update_target_state(run.store, target.label, fastest_ms=min(target.measured_ms.values()),
                        slowest_ms=max(target.measured_ms.values()))


def other_devices(run: RunContext, target: RunTarget) -> dict[str, LatencyModel]:
    """Models of devices that were measured before this one, in this run or in earlier ones, by name; says which."""
    found: dict[str, LatencyModel] = {}
    for other in run.targets[:run.targets.index(target)]:
        if other.predictor is not None:
            found[other.label] = other.predictor
    target_ids = [target_state(run.store, other.label).get("target_id") for other in run.targets]
    found |= earlier_devices(run.store, run.config, run.space, [known for known in target_ids if known])
    if found:
        run.progress.note(f"measured before: {', '.join(found)}; that helps to predict latencies of {target.label}")
    return found


def telling_first(run: RunContext, plan_NT: Tokens, others: Sequence[LatencyModel]) -> Tokens:
    """The plan with its two extremes first and then, where other devices are known, what tells most about this one."""
    if not others or len(plan_NT) < 3:
        return plan_NT
    order_N = choose_to_measure(run.space, plan_NT[2:], others, len(plan_NT) - 2, run.config.seed)
    rest = sorted(set(range(len(plan_NT) - 2)) - set(order_N.tolist()))
    return np.concatenate([plan_NT[:2], plan_NT[2:][order_N], plan_NT[2:][rest]])


def budgets(run: RunContext, target: RunTarget) -> list[float]:
    """The configured ones, or spread over what was measured; ascending, says which of them are met trivially."""
    wanted = run.config.budgets.of(target.label)
    if not wanted.values_ms:
        return spread_budgets(seeing_ms(run, target), wanted.count or run.config.budgets.count)
    slowest_ms = max(target.measured_ms.values())
    for budget_ms in wanted.values_ms:
        if budget_ms > slowest_ms:
            run.progress.note(above_slowest(budget_ms, slowest_ms, target.label))
    return sorted(wanted.values_ms)


def seeing_ms(run: RunContext, target: RunTarget) -> list[float]:
    """Measured latencies of the networks that look at their image; of all where none does."""
    rows = run.store.latency.read(["arch_id", "tokens"]).to_pylist()
    blind_N = run.space.blind(np.array([row["tokens"] for row in rows], dtype=np.int8))
    blind = {row["arch_id"] for row, is_blind in zip(rows, blind_N) if is_blind}
    seeing = [ms for arch_id, ms in target.measured_ms.items() if arch_id not in blind]
    return seeing or list(target.measured_ms.values())


def above_slowest(budget_ms: float, slowest_ms: float, label: str) -> str:
    return (f"budget {budget_ms:.4g} ms is above the slowest measured architecture ({slowest_ms:.4g} ms on {label}): "
            "it gets the most accurate model found")


def known_networks(run: RunContext, target: RunTarget) -> list[LatencyResult]:
    """What earlier runs measured on this device, the newest run's sample of each network; says what it found."""
    state = target_state(run.store, target.label)
    by_run = earlier_latencies(run.store, run.config, run.space, state["target_id"], state["reference_ms"])
    for name, results in by_run.items():
        run.progress.note(f"run {name} measured {len(results)} networks of this space on this device: they are used"
                          if results else f"run {name} measured another device or other networks: none of "
                                          "its latencies counts as measured")
    return list({result.arch_id: result for results in by_run.values() for result in results}.values())


def with_known(plan_NT: Tokens, known: Sequence[Tokens]) -> tuple[Tokens, int]:
    """The plan with what is known behind its two extremes, each row once, and how many rows that puts in front. As long
    as the plan was, or as much longer as more is known."""
    front = {row.tobytes(): row for row in (*plan_NT[:2], *known)}
    rows = front | {row.tobytes(): row for row in plan_NT[2:] if row.tobytes() not in front}
    return np.stack(list(rows.values()))[:max(len(plan_NT), len(front))], len(front)


def fit_and_save(run: RunContext, target: RunTarget) -> None:
    target.predictor = fit_predictor(run, target, list(other_devices(run, target).values()))
    save_predictor(run, target)


def save_predictor(run: RunContext, target: RunTarget) -> None:
    assert target.predictor is not None
    save_state(run.store, state_name("predictor", target.label, run.config), target.predictor.state_dict())


def fit_predictor(run: RunContext, target: RunTarget, others: Sequence[LatencyModel]) -> LatencyPredictor:
    target_id = target_state(run.store, target.label)["target_id"]
    table = run.store.latency.read(["tokens", "target_id", "latency_ms", "stderr_ms", "error"]).to_pylist()
    rows = [row for row in table if not row["error"] and row["target_id"] == target_id]
    predictor = LatencyPredictor.fit(run.space, np.array([r["tokens"] for r in rows], dtype=np.int8),
                                     np.array([r["latency_ms"] for r in rows]),
                                     np.array([r["stderr_ms"] for r in rows]), known=others)
    run.store.event("predictor", target=target.label, n=len(rows), heldout_error=predictor.heldout_error,
                    noise_floor=predictor.noise_floor, helped=len(predictor.known))
    return predictor


def spread_sample(space: SearchSpace, count: int, seed: int) -> Tokens:
    """int8[count, T], distinct, the two extremes first.

    Uniform tokens give networks of nearly equal cost; so each row takes a random share of its tokens from one of the
    extremes, which spreads latencies over the whole range.
    """
    rng = np.random.default_rng(seed)
    extremes_2T = space.canonical(space.extremes())
    rows = {row.tobytes(): row for row in extremes_2T}
    for _ in range(20 * count):
        if len(rows) >= count:
            break
        sample_1T = space.sample_uniform(rng, 1)
        end = extremes_2T[rng.integers(2)]
        row = space.repair(rng, np.where(rng.random(sample_1T.shape) < rng.random(), end, sample_1T))[0]
        rows.setdefault(row.tobytes(), row)
    return np.stack(list(rows.values()))[:count]


def spread_budgets(latencies_ms: Sequence[float], count: int) -> list[float]:
    """`count` round budgets in equal ratios, from a tenth above the fastest measured latency (less where the slowest is
    near) to the 95th percentile: accuracy grows about with the logarithm of latency, so steps of equal length would
    crowd where it grows no more."""
    fastest, high = min(latencies_ms), float(np.percentile(latencies_ms, 95))
    low = min(1.1 * fastest, float(np.sqrt(fastest * high)))
    return [float(f"{value:.3g}") for value in np.geomspace(low, high, count)]


def check_reachable(budgets_ms: Sequence[float], space: SearchSpace, measured_ms: Mapping[str, float]) -> None:
    """BudgetError for a budget below everything measured, the expected fastest architecture included."""
    fastest, slowest = min(measured_ms.values()), max(measured_ms.values())
    hopeless = [budget for budget in budgets_ms if budget < fastest]
    if hopeless:
        raise BudgetError(f"budget {hopeless[0]:.4g} ms is below the fastest architecture of {space.space_id}: the "
                          f"reachable range on this target is {fastest:.4g} to {slowest:.4g} ms; raise the budget or "
                          "choose a smaller space")
