"""From chosen architectures to files somebody can deploy: trained, exported, compared, measured, documented.

A budget is hard. For every budget the candidates are measured first; the most accurate one that fits with the safety
margin gets its weights, becomes an ONNX file, is compared with torch and measured again from the very bytes of that
file, on the device it is made for (on all of them, where budgets of several hold together). Only if that measurement
meets the budget is it handed over; otherwise the next candidate is tried. A budget that nobody meets is reported as
such, never silently exceeded.

Weights come from the supernet by fine-tuning and batch-norm recalibration. Where there is no supernet, the candidates
are finalists: the best of the search for every budget, retrained from scratch; the best of those by validation counts
([S4 6.2]).
"""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import inf
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from actors.data import Preprocessing, Splits
from actors.objectpath import AnyPath, matching
from actors.targets.target import LatencySample
from orchestrator.config import DeliverySettings
from orchestrator.controllers.controller import Answer
from orchestrator.handover.considered import Considered
from orchestrator.handover.delivered import (
    Candidate,
    Delivered,
    Final,
    contenders,
    in_order,
    ranked_under,
    shortlist,
)
from orchestrator.handover.exported import as_pixels, check_parity, described_input, file_accuracy, file_hits
from orchestrator.handover.paired import packed
from orchestrator.record.files import read_json, write_atomically, write_json
from orchestrator.record.goals import Goal
from searchspaces.errors import EvaluationError
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import LOGITS, PROBABILITIES, to_onnx
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
PARITY_IMAGES = 64
MUCH_WORSE = 0.05   # validation accuracy lost by the last training, beyond what choosing among many trials explains
NAME_DIGITS = 8  # of the architecture's id in file names


class Workbench(Protocol):
    """What a hand-over needs from the cluster, or from this process (orchestrator/services/workbench.py has both)."""

    def latencies_ms(self, target: str, tokens_NT: Tokens) -> list[float | None]:
        """Measured on the target with this label; None where measuring failed."""

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        """Validation accuracy as the search sees it; None where evaluating failed."""

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        """Of the weights that would be handed over; None where there are none."""

    def train_ahead(self, tokens_NT: Tokens) -> None:
        """Called before `trained_weights` of the same rows; the time to train several at once. Nothing goes on when it
        returns, so that what is then measured is measured undisturbed."""

    def trained_weights(self, tokens_T: Tokens) -> Mapping[str, NDArray[np.float32]]:
        """The weights to hand over, with their batch-norm statistics."""

    def training(self) -> Mapping[str, Any]:
        """How these weights come about, for the sidecar."""

    def time_file(self, target: str, model: bytes) -> LatencySample:
        """Latency of an exported file on the target with this label."""


class HandOver:
    """Delivers models of one run for one goal into `run_dir`/`folder`. `lineage` goes into every sidecar (run, weights
    version). `slowest_ms`: the goal's latency beyond which a budget excludes nothing."""

    def __init__(self, space: SearchSpace, splits: Splits, preprocessing: Preprocessing, bench: Workbench,
                 settings: DeliverySettings, run_dir: AnyPath, lineage: Mapping[str, Any], goal: Goal,
                 slowest_ms: float = inf, folder: str = "models") -> None:
        self.space = space
        self.splits = splits
        self.preprocessing = preprocessing
        self.bench = bench
        self.settings = settings
        self.run_dir = run_dir
        self.lineage = dict(lineage)
        self.goal = goal
        self.slowest_ms = slowest_ms
        self.folder = folder
        self._diverged: set[str] = set()    # arch_ids
        self.batches: dict[str, int] = {label: self.lineage["targets"][label]["target"]["batch"]
                                        for label in goal.targets}

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
        measured = self._measured(rows)
        missing = [a for a in measured if a not in known]
        if missing:
            accuracies = self.bench.accuracies(np.stack([rows[a] for a in missing]))
            known |= {a: value for a, value in zip(missing, accuracies, strict=True) if value is not None}
        return [Candidate(self.space.canonical(rows[a][None])[0], a, known[a], ms, predicted.get(a, ms),
                          known[a] or None)     # 0: a workbench that evaluates nothing did not know it
                for a, ms in measured.items() if a in known]

    def _measured(self, rows: Mapping[str, Tokens]) -> dict[str, float]:
        """The goal's latency of the networks that could be measured on all of its targets."""
        tokens_NT = np.stack(list(rows.values()))
        by_target = {label: np.array([np.nan if ms is None else ms for ms in self.bench.latencies_ms(label, tokens_NT)])
                     for label in self.goal.targets}
        latency_N = self.goal.latency_ms(by_target)
        return {arch_id: float(ms) for arch_id, ms in zip(rows, latency_N, strict=True) if np.isfinite(ms)}

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
        known = {a: replace(c, accuracy=value.accuracy, final=value) for a, c in distinct.items()
                 if (value := finals[a]) is not None}
        unserved = [chosen[0] for chosen in lists if chosen and not any(c.arch_id in known for c in chosen)]
        others = (*unserved, min(candidates, key=lambda c: c.latency_ms))
        # The accuracies of a search and of final weights are not on one scale.
        return list(({c.arch_id: replace(c, accuracy=c.accuracy - 1) for c in others} | known).values())

    def deliver(self, budgets_ms: Sequence[float], candidates: Sequence[Candidate]) -> Iterator[Delivered]:
        """One entry per budget, in ascending order.

        Each budget's best candidates (`delivery.fine_tuned` of them) are trained and measured; then every budget gets
        the most accurate (validation) of all models of this run that meet it. So a larger budget never gets a worse
        model, and a file that came out faster than the budget it was made for serves the smaller one.
        """
        self._train_first_choices(budgets_ms, candidates)
        too_slow = {budget_ms: self._make_one(budget_ms, candidates) for budget_ms in sorted(budgets_ms)}
        considered = Considered({model["arch_id"]: (model, self._latency_ms(model)) for model in self._models()},
                                [c for c in candidates if c.arch_id not in self._diverged], len(self.splits.val))
        for budget_ms, slower_ms in too_slow.items():
            fitting = [model for model in self._models() if self._latency_ms(model) <= budget_ms]
            if fitting:
                chosen = max(fitting, key=lambda model: float(model["accuracy"]["validation"]))
                certainty = considered.certainty(chosen["arch_id"], budget_ms)
                yield replace(self._entry(budget_ms, chosen), **vars(certainty))
            else:
                yield Delivered(budget_ms, False, self.miss(budget_ms, slower_ms, candidates), target=self.goal.label,
                                budgets_ms=self.goal.budgets_at(budget_ms))

    def _make_one(self, budget_ms: float, candidates: Sequence[Candidate]) -> list[float]:
        """Makes models until as many as are wanted meet the budget; returns the latencies (ms) of those that do not."""
        too_slow: list[float] = []
        met = 0
        for candidate in self._contenders(budget_ms, candidates):
            try:
                latency_ms = self._latency_ms(self._model(candidate, budget_ms))
            except EvaluationError as error:
                log.warning("%s; trying the next candidate for %.4g ms", error, budget_ms)
                self._diverged.add(candidate.arch_id)
                continue
            met += latency_ms <= budget_ms
            if met == self.settings.fine_tuned:
                break
            if latency_ms <= budget_ms:
                continue
            too_slow.append(latency_ms)
            log.info("exported %s is slower than %.4g ms; trying the next candidate", candidate.arch_id, budget_ms)
        return too_slow

    def _contenders(self, budget_ms: float, candidates: Sequence[Candidate]) -> list[Candidate]:
        return contenders(budget_ms, candidates, self.settings, len(self.splits.val))

    def _train_first_choices(self, budgets_ms: Sequence[float], candidates: Sequence[Candidate]) -> None:
        """Whatever the others turn out to be, these are made: so they may be trained before any is measured."""
        made = {known["arch_id"] for _, known in self._made_before()}
        firsts = {chosen.arch_id: chosen.tokens for budget_ms in budgets_ms
                  for chosen in self._contenders(budget_ms, candidates)[:self.settings.fine_tuned]
                  if chosen.arch_id not in made}
        if firsts:
            self.bench.train_ahead(np.stack(list(firsts.values())))

    def _latency_ms(self, sidecar: Mapping[str, Any]) -> float:
        """What the goal's budgets bound, of a model's file."""
        return float(self.goal.latency_ms({label: [sidecar["latencies"][label]["latency_ms"]]
                                           for label in self.goal.targets})[0])

    def _models(self) -> list[dict[str, Any]]:
        """Sidecars of all complete models for this goal's targets, fastest first."""
        timed = [known for _, known in self._made_before()
                 if all(label in known["latencies"] for label in self.goal.targets)]
        return sorted(timed, key=lambda known: (self._latency_ms(known), known["arch_id"]))

    def _made_before(self) -> Iterator[tuple[AnyPath, dict[str, Any]]]:
        """Sidecar's path and content of every complete model that this run's weights gave, in this goal's batches."""
        for path in matching(self.run_dir / self.folder, "*.json"):
            known = read_sidecar(path, self.goal.targets[0])
            current = known["weights_version"] == self.lineage["weights_version"]
            files = [known["files"].get(str(batch), "missing") for batch in self.batches.values()]
            if current and all((self.run_dir / file).is_file() for file in files):
                yield path, known

    def _model(self, candidate: Candidate, budget_ms: float) -> dict[str, Any]:
        """The sidecar of the candidate's model; made once, reused for other budgets and targets and after a restart."""
        for path, known in self._made_before():
            if known["arch_id"] == candidate.arch_id:
                return self._timed(path, known)
        return self._made(candidate, budget_ms)

    def _timed(self, path: AnyPath, sidecar: dict[str, Any]) -> dict[str, Any]:
        """The sidecar with this goal's targets measured."""
        missing = [label for label in self.goal.targets if label not in sidecar["latencies"]]
        for label in missing:
            model = (self.run_dir / sidecar["files"][str(self.batches[label])]).read_bytes()
            sidecar["latencies"][label] = as_json(self.bench.time_file(label, model))
        if missing:
            write_json(path, sidecar)
        return sidecar

    def _made(self, candidate: Candidate, budget_ms: float) -> dict[str, Any]:
        # Always the fine-tuned weights: the supernet's validation accuracy is the best of many and so too optimistic to
        # be compared with (tried: keeping what validated better lost a point of test accuracy on digits).
        weights = self.bench.trained_weights(candidate.tokens)
        graph = self.space.graph(candidate.tokens)
        preprocessing = replace(self.preprocessing, resolution=int(graph.input_shape[1]))
        network = GraphNetwork(graph).eval()
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        metadata = {"paretoray_run": str(self.lineage["run"]), "arch_id": candidate.arch_id,
                    "preprocessing": json.dumps(preprocessing.to_dict()),
                    "classes": json.dumps(self.splits.classes),
                    "made_for_budgets_ms": json.dumps(self.goal.budgets_at(budget_ms))}
        images = self.splits.val.read(np.arange(min(PARITY_IMAGES, len(self.splits.val))))
        pixels = as_pixels(preprocessing, self.splits.val.shape) if self.settings.preprocess_in_model else None
        models = {batch: to_onnx(graph, dict(weights), batch, metadata, pixels).SerializeToString()
                  for batch in self.batches.values()}   # by batch: a free dimension would be slower than what was timed
        parity = max(check_parity(network, model, images, preprocessing) for model in models.values())
        samples = {label: self.bench.time_file(label, models[batch]) for label, batch in self.batches.items()}
        first = models[self.batches[self.goal.targets[0]]]
        hits_I = file_hits(first, self.splits.val, preprocessing)
        accuracy = {"validation": float(hits_I.mean()),
                    "test": file_accuracy(first, self.splits.test, preprocessing)}
        if candidate.accuracy - accuracy["validation"] > MUCH_WORSE:
            log.warning("%s validates at %.1f %% after its training for the hand-over, and at %.1f %% in the search; "
                        "change the epochs or the learning rate of section delivery", candidate.arch_id,
                        100 * accuracy["validation"], 100 * candidate.accuracy)
        stem = self._stem(candidate, samples)
        if len(self.lineage["targets"]) > 1:
            stem = f"{self.goal.label}-{stem}"
        files = {str(batch): f"{self.folder}/{stem}{'' if len(models) == 1 else f'-batch{batch}'}.onnx"
                 for batch in models}
        sidecar = self._sidecar(candidate, samples, accuracy) | {
            "validation_hits": packed(hits_I),
            "madds": graph.madds, "params": graph.params, "files": files, "parity_max_difference": parity,
            "input": described_input(preprocessing, pixels),
            "output": {"name": LOGITS if pixels is None else PROBABILITIES, "classes": list(self.splits.classes)}}
        for batch, model in models.items():
            with write_atomically(self.run_dir / files[str(batch)]) as temporary:
                temporary.write_bytes(model)
        write_json(self.run_dir / self.folder / f"{stem}.json", sidecar)  # last: a sidecar means the model is complete
        return sidecar

    def _stem(self, candidate: Candidate, samples: Mapping[str, LatencySample]) -> str:
        """Of a model's files."""
        return f"{samples[self.goal.targets[0]].latency_ms:.4g}ms-{candidate.arch_id[:NAME_DIGITS]}"

    def _sidecar(self, candidate: Candidate, samples: Mapping[str, LatencySample],
                 accuracy: Mapping[str, float]) -> dict[str, Any]:
        return self.lineage | {
            "arch_id": candidate.arch_id, "tokens": [int(t) for t in candidate.tokens],
            "text": self.space.text(candidate.tokens), "space_id": self.space.space_id,
            **self.bench.training(),
            "accuracy": dict(accuracy), "accuracy_in_search": candidate.searched, "dataset": self.splits.name,
            "latencies": {label: as_json(sample) for label, sample in samples.items()},
            "latency_before_export_ms": candidate.latency_ms, "latency_predicted_ms": candidate.predicted_ms,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _entry(self, budget_ms: float, sidecar: Mapping[str, Any]) -> Delivered:
        latencies = {label: sidecar["latencies"][label] for label in self.goal.targets}
        return Delivered(
            budget_ms, True, "", tuple(sidecar["tokens"]), sidecar["arch_id"], sidecar["text"],
            self._latency_ms(sidecar), latencies[self.goal.targets[0]]["stderr_ms"], sidecar["latency_predicted_ms"],
            sidecar["accuracy"]["validation"], sidecar["accuracy"]["test"], sidecar["madds"], sidecar["params"],
            sidecar["files"][str(self.batches[self.goal.targets[0]])], self.goal.label,
            {label: sample["latency_ms"] for label, sample in latencies.items()}, self.goal.budgets_at(budget_ms),
            budget_ms > self.slowest_ms)

    def miss(self, budget_ms: float, too_slow: Sequence[float], candidates: Sequence[Candidate]) -> str:
        """Why a budget gets nothing. `too_slow`: latencies in ms of files that were made for it."""
        budget = " and ".join(f"{ms:.4g} ms on {label}" for label, ms in self.goal.budgets_at(budget_ms).items())
        latencies_ms = [candidate.latency_ms for candidate in candidates]
        reach = f"candidates reach {min(latencies_ms):.4g} to {max(latencies_ms):.4g} ms"
        if too_slow:
            return (f"no exported model meets {budget}: {len(too_slow)} that had been measured under it took "
                    f"{min(too_slow):.4g} ms or more from their files; {reach}")
        return f"no measured candidate meets {budget}; {reach}"


def read_sidecar(path: AnyPath, label: str) -> dict[str, Any]:
    """A model's sidecar; one of an earlier version has one file of batch 1 and one latency, of the target with this
    label."""
    sidecar: dict[str, Any] = read_json(path)
    if "latencies" not in sidecar:
        sidecar |= {"latencies": {label: sidecar["latency"]}, "files": {"1": sidecar["onnx"]}}
    return sidecar


def as_json(sample: LatencySample) -> dict[str, Any]:
    """All of a sample, for a sidecar: the device's state is in `details`."""
    return asdict(sample) | {"stderr_ms": sample.stderr_ms}
