"""The suite that every training method passes: one sentence per broken promise of the Training contract."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from searchspaces.space import SearchSpace
from searchspaces.training.training import (
    Batch,
    Latencies,
    Schedule,
    Training,
    TrainingMethod,
    Wishes,
    running_statistics,
)

EPOCHS, STEPS, IMAGES = 4, 3, 8
Problems = Iterator[str]


def check_method(method: TrainingMethod, space: SearchSpace, seed: int = 0) -> list[str]:
    """All violations found. Deterministic; some seconds for a small space."""
    with torch.random.fork_rng(devices=[]):
        return [problem for rule in (_learns, _resumes, _repeats_its_wishes, _snapshots, _reduces, _agrees)
                for problem in rule(method, space, seed)]


def _start(method: TrainingMethod, space: SearchSpace, seed: int, rank: int = 0, ranks: int = 1,
           parts: int = 1) -> Training:
    torch.manual_seed(seed)
    return method.start(space.make_supernet(), Schedule(EPOCHS, STEPS, seed, rank, ranks, parts))


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


def _agrees(method: TrainingMethod, space: SearchSpace, seed: int) -> Problems:
    """Two ranks that do a part of every batch each learn what one does that does both."""
    alone, *both = (_start(method, space, seed, rank, ranks, max(2, method.least_parts))
                    for rank, ranks in ((0, 1), (0, 2), (1, 2)))
    exchange = _Exchange()
    for rank, training in enumerate(both):
        training.reduce_gradients = exchange.of(rank)

    def train(training: Training, here: slice) -> None:
        training.give(_answer(training.begin_epoch()))
        for step in range(STEPS):
            (images, labels), (held, of_held) = _batch(space, step), _batch(space, 1000 + step)
            training.step((images[here], labels[here]), (held[here], of_held[here]) if method.held_out_share else None)

    train(alone, slice(None))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, both, (slice(IMAGES // 2), slice(IMAGES // 2, None))))
    for (name, one), two in zip(alone.supernet.named_parameters(), both[0].supernet.parameters(), strict=True):
        if not torch.allclose(one, two, atol=1e-5):
            yield f"two ranks with a part of every batch each learn another {name} than one rank that does both parts"
            return
    for mean, *each in zip(*(running_statistics(training.supernet) for training in (alone, *both)), strict=True):
        if not torch.allclose(mean, torch.stack(each).mean(0), atol=1e-5):
            yield "running statistics are not the mean over the parts; take the parts of a batch from Training.parts"
            return


class _Exchange:
    """Makes the gradients of two trainings in two threads their mean."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._seen: dict[int, list[Tensor]] = {}

    def of(self, rank: int) -> Callable[[Iterable[nn.Parameter]], None]:
        def reduce(parameters: Iterable[nn.Parameter]) -> None:
            mine = self._seen[rank] = [p.grad for p in parameters if p.grad is not None]
            self._barrier.wait()
            means = [(one + other) / 2 for one, other in zip(self._seen[0], self._seen[1], strict=True)]
            self._barrier.wait()
            for gradient, mean in zip(mine, means):
                gradient.copy_(mean)

        return reduce


def _equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
