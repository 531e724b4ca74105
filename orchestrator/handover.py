"""From chosen architectures to files somebody can deploy: trained, exported, compared, measured, documented.

A budget is hard. For every budget the candidates are measured first; the most accurate one that fits with the safety
margin gets its weights, becomes an ONNX file, is compared with torch and measured again from the very bytes of that
file. Only if that measurement meets the budget is it handed over; otherwise the next candidate is tried. A budget that
nobody meets is reported as such, never silently exceeded.

Weights come from the supernet by fine-tuning and batch-norm recalibration. Where there is no supernet, the candidates
are finalists: the best of the search for every budget, retrained from scratch; the best of those by validation counts
([S4 6.2]).
"""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actors.data import Preprocessing, Splits
from actors.targets.target import LatencySample
from orchestrator.config import DeliverySettings
from orchestrator.controllers.controller import Answer
from orchestrator.exported import check_parity, file_accuracy
from orchestrator.store import read_json, write_atomically, write_json
from searchspaces.errors import EvaluationError
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
PARITY_IMAGES = 64
NAME_DIGITS = 8  # of the architecture's id in file names


class Workbench(Protocol):
    """What a hand-over needs from the cluster, or from this process (orchestrator/workbench.py has both)."""

    def latencies_ms(self, tokens_NT: Tokens) -> list[float | None]:
        """Measured on the target; None where measuring failed."""

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        """Validation accuracy as the search sees it; None where evaluating failed."""

    def finals(self, tokens_NT: Tokens) -> list[float | None]:
        """Validation accuracy of the weights that would be handed over; None where there are none."""

    def trained_weights(self, tokens_T: Tokens) -> Mapping[str, NDArray[np.float32]]:
        """The weights to hand over, with their batch-norm statistics."""

    def training(self) -> Mapping[str, Any]:
        """How these weights come about, for the sidecar."""

    def time_file(self, model: bytes) -> LatencySample:
        """Latency of an exported file on the target."""


@dataclass(frozen=True)
class Candidate:
    """An architecture with its measured latency and the validation accuracy it is ranked by."""

    tokens: Tokens
    arch_id: str
    accuracy: float
    latency_ms: float
    predicted_ms: float


@dataclass(frozen=True)
class Delivered:
    """One entry of generated.json. Without a model (`feasible` False) `reason` says why and `onnx` is empty."""

    budget_ms: float
    feasible: bool
    reason: str = ""
    tokens: tuple[int, ...] = ()
    arch_id: str = ""
    text: str = ""
    latency_ms: float | None = None
    latency_stderr_ms: float | None = None
    predicted_ms: float | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    madds: int | None = None
    params: int | None = None
    onnx: str = ""


def ranked_under(budget_ms: float, candidates: Sequence[Candidate], margin: float) -> list[Candidate]:
    """Candidates that fit the budget less its margin, most accurate first; then those that fit it only just."""
    fitting = [c for c in candidates if c.latency_ms <= budget_ms]
    return sorted(fitting, key=lambda c: (c.latency_ms > budget_ms * (1 - margin), -c.accuracy, c.latency_ms))


def shortlist(budgets_ms: Sequence[float], candidates: Sequence[Candidate],
              settings: DeliverySettings) -> list[list[Candidate]]:
    """Per budget the candidates that are tried for it, most promising first."""
    return [ranked_under(budget_ms, candidates, settings.margin)[:settings.alternatives] for budget_ms in budgets_ms]


def in_order(chosen: Sequence[Candidate], arch_ids: Sequence[str], limit_ms: float) -> list[Candidate]:
    """Candidates for one budget in the order of `arch_ids`, the others behind; those over `limit_ms` stay last."""
    rank = {arch_id: i for i, arch_id in enumerate(arch_ids)}
    return sorted(chosen, key=lambda c: (c.latency_ms > limit_ms, rank.get(c.arch_id, len(rank))))


class HandOver:
    """Delivers models of one run into `run_dir`/models. `lineage` goes into every sidecar (run, weights version)."""

    def __init__(self, space: SearchSpace, splits: Splits, preprocessing: Preprocessing, bench: Workbench,
                 settings: DeliverySettings, run_dir: Path, lineage: Mapping[str, Any]) -> None:
        self.space = space
        self.splits = splits
        self.preprocessing = preprocessing
        self.bench = bench
        self.settings = settings
        self.run_dir = run_dir
        self.lineage = dict(lineage)

    def candidates(self, answers: Sequence[Sequence[Answer]], extra_NT: Tokens) -> list[Candidate]:
        """Every distinct architecture among the answers and `extra_NT`, measured, with its accuracy."""
        predicted: dict[str, float] = {}
        known: dict[str, float] = {}
        rows: dict[str, Tokens] = {self.space.arch_id(row): row for row in extra_NT}
        for answer in (a for alternatives in answers for a in alternatives):
            arch_id = self.space.arch_id(answer.tokens)
            rows[arch_id] = answer.tokens
            predicted[arch_id] = answer.latency_ms
            if answer.observed:
                known[arch_id] = answer.accuracy
        latencies = self.bench.latencies_ms(np.stack(list(rows.values())))
        measured = {a: ms for a, ms in zip(rows, latencies, strict=True) if ms is not None}
        missing = [a for a in measured if a not in known]
        if missing:
            accuracies = self.bench.accuracies(np.stack([rows[a] for a in missing]))
            known |= {a: value for a, value in zip(missing, accuracies, strict=True) if value is not None}
        return [Candidate(self.space.canonical(rows[a][None])[0], a, known[a], ms, predicted.get(a, ms))
                for a, ms in measured.items() if a in known]

    def finalists(self, budgets_ms: Sequence[float], candidates: Sequence[Candidate],
                  answers: Sequence[Sequence[Answer]] | None = None) -> list[Candidate]:
        """The shortlists of all budgets, each architecture once, with the validation accuracy of its final weights.
        `answers`, one list per budget, is the order of a controller that ranks finalists itself.

        A budget none of whose candidates has final weights keeps its first one, which is trained when its turn comes.
        The fastest candidate always stays, as the end of what can be reached. Both rank behind all that have weights.
        """
        lists = shortlist(budgets_ms, candidates, self.settings)
        if answers is not None:
            lists = [in_order(ranked_under(budget_ms, candidates, self.settings.margin),
                              [self.space.arch_id(answer.tokens) for answer in options],
                              budget_ms * (1 - self.settings.margin))[:self.settings.alternatives]
                     for budget_ms, options in zip(budgets_ms, answers, strict=True)]
        distinct = {c.arch_id: c for chosen in lists for c in chosen}
        if not distinct:
            return list(candidates)
        finals = dict(zip(distinct, self.bench.finals(np.stack([c.tokens for c in distinct.values()])), strict=True))
        known = {a: replace(c, accuracy=value) for a, c in distinct.items() if (value := finals[a]) is not None}
        unserved = [chosen[0] for chosen in lists if chosen and not any(c.arch_id in known for c in chosen)]
        others = (*unserved, min(candidates, key=lambda c: c.latency_ms))
        # The accuracies of a search and of final weights are not on one scale.
        return list(({c.arch_id: replace(c, accuracy=c.accuracy - 1) for c in others} | known).values())

    def deliver(self, budgets_ms: Sequence[float], candidates: Sequence[Candidate]) -> Iterator[Delivered]:
        """One entry per budget, in ascending order.

        Each budget's best candidate is trained and measured; the budget then gets the most accurate (validation) of all
        models of this run that meet it, so that a larger budget never gets a worse model.
        """
        for budget_ms in sorted(budgets_ms):
            too_slow: list[float] = []
            for candidate in shortlist([budget_ms], candidates, self.settings)[0]:
                try:
                    latency_ms = self._model(candidate)["latency"]["latency_ms"]
                except EvaluationError as error:
                    log.warning("%s; trying the next candidate for %.4g ms", error, budget_ms)
                    continue
                if latency_ms <= budget_ms:
                    break
                too_slow.append(latency_ms)
                log.info("exported %s is slower than %.4g ms; trying the next candidate", candidate.arch_id, budget_ms)
            fitting = [model for model in self._models() if model["latency"]["latency_ms"] <= budget_ms]
            if fitting:
                yield _entry(budget_ms, max(fitting, key=lambda model: float(model["accuracy"]["validation"])))
            else:
                yield Delivered(budget_ms, False, _miss(budget_ms, too_slow, [c.latency_ms for c in candidates]))

    def _models(self) -> list[dict[str, Any]]:
        """Sidecars of all complete models that this run's weights gave, fastest first."""
        sidecars = [read_json(path) for path in (self.run_dir / "models").glob("*.json")
                    if path.with_suffix(".onnx").exists()]
        current = [known for known in sidecars if known["weights_version"] == self.lineage["weights_version"]]
        return sorted(current, key=lambda known: (known["latency"]["latency_ms"], known["arch_id"]))

    def _model(self, candidate: Candidate) -> dict[str, Any]:
        """The sidecar of the candidate's model; made once, reused for other budgets and after a restart."""
        for known in self._models():
            if known["arch_id"] == candidate.arch_id:
                return known
        folder = self.run_dir / "models"
        # Always the fine-tuned weights: the supernet's validation accuracy is the best of many and so too optimistic to
        # be compared with (tried: keeping what validated better lost a point of test accuracy on digits).
        weights = self.bench.trained_weights(candidate.tokens)
        graph = self.space.graph(candidate.tokens)
        preprocessing = replace(self.preprocessing, resolution=int(graph.input_shape[1]))
        network = GraphNetwork(graph).eval()
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        metadata = {"paretoray_run": str(self.lineage["run"]), "arch_id": candidate.arch_id,
                    "preprocessing": json.dumps(preprocessing.to_dict())}
        model = to_onnx(graph, dict(weights), metadata=metadata).SerializeToString()
        parity = check_parity(network, model, preprocessing.numpy(self.splits.val.images[:PARITY_IMAGES]))
        sample = self.bench.time_file(model)
        accuracy = {"validation": file_accuracy(model, self.splits.val, preprocessing),
                    "test": file_accuracy(model, self.splits.test, preprocessing)}
        stem = f"{sample.latency_ms:.4g}ms-{candidate.arch_id[:NAME_DIGITS]}"
        sidecar = self._sidecar(candidate, sample, accuracy) | {
            "madds": graph.madds, "params": graph.params, "onnx": f"models/{stem}.onnx",
            "parity_max_difference": parity,
            "input": {"name": "images", "layout": "NCHW float32", "preprocessing": preprocessing.to_dict()}}
        with write_atomically(folder / f"{stem}.onnx") as temporary:
            temporary.write_bytes(model)
        write_json(folder / f"{stem}.json", sidecar)  # last: a sidecar means the model is complete
        return sidecar

    def _sidecar(self, candidate: Candidate, sample: LatencySample,
                 accuracy: Mapping[str, float]) -> dict[str, Any]:
        return self.lineage | {
            "arch_id": candidate.arch_id, "tokens": [int(t) for t in candidate.tokens],
            "text": self.space.text(candidate.tokens), "space_id": self.space.space_id,
            **self.bench.training(),
            "output": {"name": "logits", "classes": list(self.splits.classes)},
            "accuracy": dict(accuracy), "dataset": self.splits.name,
            "latency": asdict(sample) | {"stderr_ms": sample.stderr_ms},
            "latency_before_export_ms": candidate.latency_ms, "latency_predicted_ms": candidate.predicted_ms,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def _miss(budget_ms: float, too_slow: Sequence[float], reach_ms: Sequence[float]) -> str:
    if too_slow:
        return (f"no exported model meets {budget_ms:.4g} ms: {len(too_slow)} that had been measured under it took "
                f"{min(too_slow):.4g} ms or more from their files")
    return (f"no measured candidate meets {budget_ms:.4g} ms; candidates reach {min(reach_ms):.4g} to "
            f"{max(reach_ms):.4g} ms")


def _entry(budget_ms: float, sidecar: Mapping[str, Any]) -> Delivered:
    latency = sidecar["latency"]
    return Delivered(
        budget_ms, True, "", tuple(sidecar["tokens"]), sidecar["arch_id"], sidecar["text"], latency["latency_ms"],
        latency["stderr_ms"], sidecar["latency_predicted_ms"], sidecar["accuracy"]["validation"],
        sidecar["accuracy"]["test"], sidecar["madds"], sidecar["params"], sidecar["onnx"])
