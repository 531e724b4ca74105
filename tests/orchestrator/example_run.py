"""Run folders for tests of what a person sees: written by the real store, over a real space, with invented numbers."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.record.files import write_json
from orchestrator.record.store import RunStore, Trial
from searchspaces.mobilenetv3.space import MobileNetV3S32
from searchspaces.space import SearchSpace

CONFIG = {"data": {"name": "digits"}, "space": {"name": "mobilenetv3-s32"}, "target": {"name": "onnx_cpu"},
          "controller": {"name": "pnag"}, "budgets": {"values_ms": [], "count": 6}}


def example_space() -> SearchSpace:
    return MobileNetV3S32(classes=10, channels=3)


def add_trials(store: RunStore, space: SearchSpace, count: int, seed: int = 0) -> list[Trial]:
    """Trials whose accuracy grows with multiply-adds; one in fifty failed; the second half proposed for budgets."""
    rng = np.random.default_rng(seed)
    rows = space.canonical(space.sample_uniform(rng, min(count, 400)))
    madds, params = space.cost(rows)
    trials = []
    for i in range(count):
        at = i % len(rows)
        late = i > count // 2
        latency_ms = float(madds[at] / 1e7 * rng.normal(1, 0.1))
        accuracy = float(0.99 - 0.25 * np.exp(-madds[at] / 1.2e7) - abs(rng.normal(0, 0.008 if late else 0.02)))
        failed = i % 50 == 49
        trials.append(Trial(
            i, space.arch_id(rows[at]), tuple(int(t) for t in rows[at]), space.space_id, "pnag",
            None if failed else accuracy, "supernet", 1, latency_ms, "predicted", "onnx_cpu-0123456789ab",
            int(madds[at]), int(params[at]), 3.0 if late else None, None, 0, 1.79e9 + i, 0.7, "127.0.0.1",
            "worker lost" if failed else ""))
    store.append_trials(trials)
    return trials


def add_latencies(store: RunStore, space: SearchSpace, count: int) -> None:
    rng = np.random.default_rng(1)
    rows = space.canonical(space.sample_uniform(rng, count))
    measured = space.cost(rows)[0] / 1e7
    store.latency.append([{
        "arch_id": space.arch_id(row), "tokens": row.tolist(), "target_id": "onnx_cpu-0123456789ab",
        "latency_ms": float(ms), "predicted_ms": float(ms * rng.normal(1, 0.02)), "stderr_ms": float(ms * 0.01),
        "source": "initial"} for row, ms in zip(rows, measured)])


def add_models(store: RunStore, space: SearchSpace, trials: list[Trial], budgets_ms: list[float]) -> None:
    """The best trial under each budget, measured a little faster and trained a little better; one budget unmet."""
    entries: list[dict[str, Any]] = [{"budget_ms": 0.01, "feasible": False, "reason": "no measured candidate meets it"}]
    for budget_ms in budgets_ms:
        under = [t for t in trials if t.accuracy is not None and (t.latency_ms or 9e9) <= budget_ms]
        best = max(under, key=lambda t: t.accuracy or 0)
        entries.append({
            "budget_ms": budget_ms, "feasible": True, "tokens": list(best.tokens), "arch_id": best.arch_id,
            "text": space.text(np.array(best.tokens, dtype=np.int8)), "latency_ms": 0.97 * (best.latency_ms or 0),
            "latency_stderr_ms": 0.02, "predicted_ms": best.latency_ms, "accuracy": 0.003 + (best.accuracy or 0),
            "test_accuracy": (best.accuracy or 0) - 0.004, "madds": best.madds, "params": best.params,
            "onnx": f"models/{budget_ms:g}ms-{best.arch_id}.onnx"})
    write_json(store.path / "generated.json", entries)


def add_epochs(store: RunStore, epochs: int) -> None:
    for epoch in range(epochs):
        store.event("epoch", epoch=epoch, loss=2.3 * 0.9 ** epoch + 0.05, accuracy_largest=0.99 - 0.6 * 0.85 ** epoch,
                    accuracy_smallest=0.95 - 0.7 * 0.88 ** epoch)


def add_iterations(store: RunStore, trained: list[int], trusted: list[int]) -> None:
    """A learning controller's metrics; counts per iteration, rewards that grow."""
    for i in range(len(trained)):
        store.event("controller", iteration=i + 1, trained=sum(trained[:i + 1]), trusted=sum(trusted[:i + 1]),
                    reward_mean=0.3 + 0.02 * i, reward_best=0.5 + 0.01 * i)


def empty_run(root: Path, name: str = "example") -> RunStore:
    return RunStore.create(root, name, yaml.safe_dump(CONFIG), {"versions": {"torch": "2.13.0"}, "seed": 0})


def full_run(root: Path, name: str = "example", trials: int = 300) -> RunStore:
    space, store = example_space(), empty_run(root, name)
    add_epochs(store, 30)
    add_latencies(store, space, 60)
    recorded = add_trials(store, space, trials)
    latencies = [t.latency_ms or 0 for t in recorded]
    budgets_ms = [float(f"{q:.3g}") for q in np.quantile(latencies, [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])]
    add_models(store, space, recorded, budgets_ms)
    store.event("predictor", n=60, heldout_error=0.021, noise_floor=0.015)
    store.update_state(stage="done")
    return store
