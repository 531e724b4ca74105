"""The suite that every training method passes: one sentence per broken promise of the Training contract."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from searchspaces.space import SearchSpace
from searchspaces.training.training import Batch, Latencies, Schedule, Training, TrainingMethod, Wishes

EPOCHS, STEPS, IMAGES = 4, 3, 8
Problems = Iterator[str]


def check_method(method: TrainingMethod, space: SearchSpace, seed: int = 0) -> list[str]:
    """All violations found. Deterministic; some seconds for a small space."""
    with torch.random.fork_rng(devices=[]):
        return [problem for rule in (_learns, _resumes, _repeats_its_wishes, _snapshots, _reduces)
                for problem in rule(method, space, seed)]


def _start(method: TrainingMethod, space: SearchSpace, seed: int) -> Training:
    torch.manual_seed(seed)
    return method.start(space.make_supernet(), Schedule(EPOCHS, STEPS, seed))


def _batch(space: SearchSpace, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = space.graph(space.extremes()[1]).input_shape
    labels = torch.arange(IMAGES) % space.classes
    return torch.randn(IMAGES, *shape, generator=generator), labels


def _answer(wishes: Wishes) -> Latencies:
    return {label: 1.0 + rows_NT.astype(np.float64).sum(axis=1) for label, rows_NT in wishes.items()}


def _epoch(training: Training, space: SearchSpace, epoch: int, held_out: bool) -> list[dict[str, float]]:
    training.give(_answer(training.begin_epoch()))
    numbers = [10 * epoch + step for step in range(STEPS)]
    return [training.step(_batch(space, n), _batch(space, 1000 + n) if held_out else None) for n in numbers]


def _learns(method: TrainingMethod, space: SearchSpace, seed: int) -> Problems:
    training = _start(method, space, seed)
    before = {name: tensor.clone() for name, tensor in training.supernet.named_parameters()}
    for epoch in range(EPOCHS):
        for numbers in _epoch(training, space, epoch, method.held_out_share > 0):
            missing = [name for name in training.scalars if name not in numbers]
            if missing or not all(np.isfinite(value) for value in numbers.values()):
                yield f"step must give finite numbers for {list(training.scalars)}, gave {numbers}"
                return
    if training.steps_done != EPOCHS * STEPS:
        yield f"steps_done is {training.steps_done} after {EPOCHS * STEPS} steps"
    if all(torch.equal(before[name], tensor) for name, tensor in training.supernet.named_parameters()):
        yield "no weight changed in a whole training"
    counts = training.update_counts()
    if set(counts) != {choice.name for choice in space.choices} or max(most for most, _ in counts.values()) < 1:
        yield "update_counts must say for every position how often its values were trained"


def _resumes(method: TrainingMethod, space: SearchSpace, seed: int) -> Problems:
    """Through safetensors and in a process with another random state, after every epoch."""
    whole = _start(method, space, seed)
    for epoch in range(EPOCHS):
        state = load(save(whole.state_dict()))
        _epoch(whole, space, epoch, method.held_out_share > 0)
        torch.manual_seed(seed + 99)
        resumed = method.start(space.make_supernet(), Schedule(EPOCHS, STEPS, seed))
        resumed.load_state_dict(state)
        _epoch(resumed, space, epoch, method.held_out_share > 0)
        if not _equal(whole.state_dict(), resumed.state_dict()):
            yield f"a training restored from state_dict before epoch {epoch + 1} differs after it"
            return


def _repeats_its_wishes(method: TrainingMethod, space: SearchSpace, seed: int) -> Problems:
    training = _start(method, space, seed)
    for epoch in range(EPOCHS):
        first, again = training.begin_epoch(), training.begin_epoch()
        if first.keys() != again.keys() or any(not np.array_equal(first[label], again[label]) for label in first):
            yield "begin_epoch, called twice before the first step, gives different wishes"
            return
        for label, rows_NT in first.items():
            space.check_tokens(rows_NT)
            if not len(rows_NT):
                yield f"it wishes for no architecture of goal {label}; leave the label out"
        _epoch(training, space, epoch, method.held_out_share > 0)


def _snapshots(method: TrainingMethod, space: SearchSpace, seed: int) -> Problems:
    training = _start(method, space, seed)
    state = training.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    _epoch(training, space, 0, method.held_out_share > 0)
    if not _equal(state, kept):
        yield "state_dict moves with the training; it must be a copy"


def _reduces(method: TrainingMethod, space: SearchSpace, seed: int) -> Problems:
    """The hook gets parameters with gradients, the same ones in the same order on every rank."""
    seen: list[list[tuple[int, ...]]] = []
    for _ in range(2):
        training = _start(method, space, seed)
        calls: list[tuple[int, ...]] = []

        def reduce(parameters: Iterable[nn.Parameter], calls: list[tuple[int, ...]] = calls) -> None:
            calls.extend(tuple(parameter.shape) for parameter in parameters if parameter.grad is not None)

        training.reduce_gradients = reduce
        _epoch(training, space, 0, method.held_out_share > 0)
        seen.append(calls)
    if not seen[0]:
        yield "reduce_gradients is never called"
    if seen[0] != seen[1]:
        yield "reduce_gradients is called with other parameters, or in another order, by an equal training"


def _equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
