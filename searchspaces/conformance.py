"""The conformance suite of search spaces: what every space promises, ours or a user's.

    problems = check_space(MySpace(classes=10, channels=3))      # [] means certified

`paretoray check module:Class` prints the same list. Each rule is a function that yields one sentence per violation; a
rule that raises is a violation too. Rules on the tokens come first, and if they fail the rest is not tried.
"""
from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from searchspaces.errors import SpaceError
from searchspaces.graph import INPUT, Graph
from searchspaces.network import GraphNetwork, input_of
from searchspaces.space import SearchSpace, Tokens
from searchspaces.supernet import Supernet

SAMPLES = 32           # rows for the rules that only count or encode
NETWORKS = 3           # rows that are run in torch, besides the extremes
BRUTE_FORCE = 4096     # token combinations up to which `size` is verified by enumeration
TOLERANCE = 1e-4       # outputs of shared and extracted weights, relative to the largest logit
Problems = Iterator[str]
Rule = Callable[[SearchSpace, Tokens], Problems]


def check_space(space: SearchSpace, seed: int = 0) -> list[str]:
    """All violations found, as sentences. Deterministic; takes seconds, with large images up to a minute."""
    problems = _run(lambda space, _: _choices(space), space, np.zeros((0, 0), dtype=np.int8))
    if problems:
        return problems
    rng = np.random.default_rng(seed)
    try:
        rows = space.sample_uniform(rng, SAMPLES)
    except Exception as error:  # a user's code may raise anything, and the report must say so
        return [f"sample_uniform raised {type(error).__name__}: {error}"]
    for rule in TOKEN_RULES:
        problems += _run(rule, space, rows)
    if problems:
        return problems
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [problem for rule in NETWORK_RULES for problem in _run(rule, space, rows)]


def _run(rule: Rule, space: SearchSpace, rows: Tokens) -> list[str]:
    problems: list[str] = []
    try:
        for problem in rule(space, rows):
            problems.append(problem)
    except Exception as error:  # as above
        name = rule.__name__.strip("_<>").replace("_", " ")
        problems.append(f"checking '{name}' raised {type(error).__name__}: {error}")
    return problems


# --- tokens --------------------------------------------------------------------------------------------------------


def _choices(space: SearchSpace) -> Problems:
    if not isinstance(space.space_id, str) or not space.space_id:
        yield f"space_id must be a non-empty text, is {space.space_id!r}"
    if not space.choices:
        yield "choices is empty; a space needs at least one token position"
    names = [choice.name for choice in space.choices]
    if len(set(names)) < len(names):
        yield "two choices have the same name"
    for choice in space.choices:
        if not 1 <= len(choice.values) <= 127 or len(set(choice.values)) < len(choice.values):
            yield f"choice {choice.name} needs 1 to 127 distinct values, has {len(choice.values)}"


def _samples(space: SearchSpace, rows: Tokens) -> Problems:
    yield from _rows_are_legal(space, rows, "sample_uniform", SAMPLES)
    again = space.sample_uniform(np.random.default_rng(0), 4), space.sample_uniform(np.random.default_rng(0), 4)
    if not np.array_equal(*again):
        yield "sample_uniform gives different rows for equal generators; draw only from the generator it is given"


def _rows_are_legal(space: SearchSpace, rows: Tokens, origin: str, n: int) -> Problems:
    if rows.shape != (n, len(space.choices)) or rows.dtype != np.int8:
        yield f"{origin} must give int8[{n}, {len(space.choices)}], gave {rows.dtype}{list(rows.shape)}"
        return
    try:
        space.check_tokens(rows)
    except SpaceError as error:
        yield f"{origin}: {error}"
        return
    live = space.live_mask(rows)
    for row, alive in zip(rows, live):
        for position in np.flatnonzero(alive):
            mask = space.valid(row[:position])
            if len(mask) != len(space.choices[position].values):
                yield f"valid() gives {len(mask)} values at position {position}, the choice has another number"
                return
            if not mask[row[position]]:
                yield f"{origin} gives value {row[position]} at position {position}, which valid() excludes"
                return
    if not np.array_equal(space.canonical(rows), rows):
        yield f"{origin} gives rows that are not canonical"


def _canonical(space: SearchSpace, rows: Tokens) -> Problems:
    live = space.live_mask(rows)
    if live.shape != rows.shape or live.dtype != np.bool_:
        yield f"live_mask must give bool{list(rows.shape)}, gave {live.dtype}{list(live.shape)}"
        return
    raw = _redraw_dead(space, rows)
    once = space.canonical(raw)
    if not np.array_equal(space.canonical(once), once):
        yield "canonical is not idempotent"
    if not np.array_equal(space.live_mask(once), space.live_mask(raw)):
        yield "live_mask changes when dead tokens are replaced; it must depend on live tokens only"


def _redraw_dead(space: SearchSpace, rows: Tokens) -> Tokens:
    """The rows with other values in their dead positions."""
    rng = np.random.default_rng(2)
    changed = rows.copy()
    for row, alive in zip(changed, space.live_mask(rows)):
        for position in np.flatnonzero(~alive):
            row[position] = rng.choice(np.flatnonzero(space.valid(row[:position])))
    return changed


def _variation(space: SearchSpace, rows: Tokens) -> Problems:
    rng = np.random.default_rng(1)
    before = rows.copy()
    yield from _rows_are_legal(space, space.mutate(rng, rows, 0.2), "mutate", len(rows))
    yield from _rows_are_legal(space, space.crossover(rng, rows, rows[::-1]), "crossover", len(rows))
    if not np.array_equal(before, rows):
        yield "mutate or crossover changes its input in place"


def _extremes(space: SearchSpace, rows: Tokens) -> Problems:
    extremes = space.extremes()
    yield from _rows_are_legal(space, extremes, "extremes", 2)
    fastest, slowest = (int(value) for value in space.cost(extremes)[0])
    if fastest > slowest:
        yield f"extremes gives a fastest architecture with more multiply-adds ({fastest}) than the slowest ({slowest})"


def _size(space: SearchSpace, rows: Tokens) -> Problems:
    size, distinct = space.size(), len(np.unique(rows, axis=0))
    if not isinstance(size, int) or size < distinct:
        yield f"size() is {size!r}, but a sample alone holds {distinct} distinct architectures; it must be an exact int"
        return
    if int(np.prod(space.vocabulary_sizes.astype(float))) > BRUTE_FORCE:
        return
    every = [row for row in itertools.product(*(range(v) for v in space.vocabulary_sizes)) if _is_valid(space, row)]
    counted = len(np.unique(space.canonical(np.array(every, dtype=np.int8)), axis=0))
    if counted != size:
        yield f"size() is {size}, but enumeration finds {counted} canonical architectures"


def _is_valid(space: SearchSpace, row: tuple[int, ...]) -> bool:
    return all(space.valid(np.array(row[:position], dtype=np.int8))[token] for position, token in enumerate(row))


def _encoding(space: SearchSpace, rows: Tokens) -> Problems:
    codes = space.onehot(rows)
    if codes.ndim != 2 or codes.dtype != np.float32 or len(codes) != len(rows):
        yield f"onehot must give float32[{len(rows)}, D], gave {codes.dtype}{list(codes.shape)}"
        return
    if any(not np.array_equal(space.onehot(row[None]), code[None]) for row, code in zip(rows, codes)):
        yield "onehot of one row differs from the same row of a batch"
    if len(np.unique(codes, axis=0)) != len(np.unique(rows, axis=0)):
        yield "onehot must differ exactly where canonical rows differ"


def _names(space: SearchSpace, rows: Tokens) -> Problems:
    distinct = np.unique(rows, axis=0)
    for name, function in (("text", space.text), ("arch_id", space.arch_id)):
        if len({function(row) for row in distinct}) < len(distinct):
            yield f"{name} is the same for different architectures"


# --- networks ------------------------------------------------------------------------------------------------------


def _dead_tokens(space: SearchSpace, rows: Tokens) -> Problems:
    """Dead tokens redrawn: nothing may change."""
    rows = rows[~space.live_mask(rows).all(axis=1)][:8]
    if len(rows):
        yield from _same(space, _redraw_dead(space, rows), rows, "changing dead tokens")


def _drawn_rows(space: SearchSpace, rows: Tokens) -> Problems:
    """Rows as a policy draws them, value by value, are the architectures of their canonical rows."""
    rng, raw = np.random.default_rng(3), np.zeros_like(rows[:8])
    for row in raw:
        for position in range(len(row)):
            row[position] = rng.choice(np.flatnonzero(space.valid(row[:position])))
    yield from _same(space, raw, space.canonical(raw), "making a row canonical")


def _same(space: SearchSpace, changed: Tokens, rows: Tokens, change: str) -> Problems:
    if not np.array_equal(space.canonical(changed), rows):
        yield f"{change} changes the canonical row"
    if not np.array_equal(space.onehot(changed), space.onehot(rows)):
        yield f"{change} changes onehot"
    if any(space.arch_id(a) != space.arch_id(b) for a, b in zip(changed, rows)):
        yield f"{change} changes arch_id"
    if not np.array_equal(space.features(changed), space.features(rows)):
        yield f"{change} changes features"
    if not np.array_equal(space.cost(changed), space.cost(rows)):
        yield f"{change} changes the cost"
    if not np.array_equal(space.latency_features(changed), space.latency_features(rows)):
        yield f"{change} changes latency_features"
    if any(space.graph(a) != space.graph(b) for a, b in zip(changed, rows)):
        yield f"{change} changes the graph"


def _cost(space: SearchSpace, rows: Tokens) -> Problems:
    madds, params = space.cost(rows)
    for row, row_madds, row_params in zip(rows, madds, params):
        graph = space.graph(row)
        if (int(row_madds), int(row_params)) != (graph.madds, graph.params):
            yield (f"cost gives {row_madds} multiply-adds and {row_params} parameters for {space.text(row)}, its graph "
                   f"has {graph.madds} and {graph.params}")
            return


def _features(space: SearchSpace, rows: Tokens) -> Problems:
    for name, function in (("features", space.features), ("latency_features", space.latency_features)):
        features = function(rows)
        if features.ndim != 2 or features.dtype != np.float32 or len(features) != len(rows):
            yield f"{name} must give float32[{len(rows)}, F], gave {features.dtype}{list(features.shape)}"
        elif not np.isfinite(features).all() or (name == "latency_features" and (features < 0).any()):
            yield f"{name} must be finite, and latency_features not negative"
        elif any(not np.allclose(function(row[None])[0], feature, rtol=1e-5) for row, feature in zip(rows, features)):
            yield f"{name} of one row differ from the same row of a batch"


def _graphs(space: SearchSpace, rows: Tokens) -> Problems:
    for row in np.concatenate([space.extremes(), rows[:NETWORKS]]):
        graph = space.graph(row)
        problems = list(_structure(space, graph))
        if problems:
            yield from (f"graph of {space.text(row)}: {problem}" for problem in problems)
            return
        network = GraphNetwork(graph)
        logits = network.train()(torch.randn(2, *graph.input_shape))
        if logits.shape != (2, space.classes) or not bool(torch.isfinite(logits).all()):
            yield f"graph of {space.text(row)} gives logits of shape {list(logits.shape)} or not finite ones in torch"
        params = sum(p.numel() for p in network.parameters())
        if params != graph.params:
            yield f"graph of {space.text(row)} counts {graph.params} parameters, its torch network has {params}"


def _structure(space: SearchSpace, graph: Graph) -> Problems:
    known: set[str] = set()
    for node in graph.nodes:
        if not known.issuperset(node.inputs):
            yield f"node {node.name} comes before one of its inputs"
        known.add(node.name)
    if graph.nodes[0].name != INPUT or graph.input_shape[0] != space.channels:
        yield f"its input has shape {graph.input_shape}, the data has {space.channels} channels"
    if graph.nodes[-1].shape != (space.classes,):
        yield f"its last node has shape {graph.nodes[-1].shape}, the data has {space.classes} classes"
    in_blocks = [name for block in graph.blocks for name in block.nodes]
    if sorted(in_blocks) != sorted(known - {INPUT}):
        yield "every node but the input must belong to exactly one block"


def _pickles(space: SearchSpace, rows: Tokens) -> Problems:
    copy = pickle.loads(pickle.dumps(space))
    if copy.space_id != space.space_id or copy.graph(rows[0]) != space.graph(rows[0]):
        yield "a pickled copy has another space_id or gives another graph"


def _supernet(space: SearchSpace, rows: Tokens) -> Problems:
    try:
        supernet = space.make_supernet()
    except SpaceError:
        return  # a space without weight sharing says so with this error
    subnets = np.concatenate([space.extremes(), rows[:NETWORKS]])
    images = torch.randn(4, *space.graph(subnets[1]).input_shape)
    with torch.no_grad():  # away from initial values, so that a wrong slice or statistic cannot hide
        for parameter in supernet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for row in subnets:
            supernet.train().set_active(row)
            supernet(images)
    for mode in (True, False):
        supernet.train(mode)
        for row in subnets:
            with torch.no_grad():
                yield from _one_subnet(space, supernet, row, images, "training" if mode else "evaluation")
    mixture = [torch.full((size,), 1.0 / size, requires_grad=True) for size in space.vocabulary_sizes]
    supernet.forward_mixture(images, mixture).square().sum().backward()
    if any(weight.grad is None or not bool(torch.isfinite(weight.grad).all()) for weight in mixture):
        yield "forward_mixture gives no finite gradient for the weights of some position"


def _one_subnet(space: SearchSpace, supernet: Supernet, row: Tokens, images: torch.Tensor, mode: str) -> Problems:
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    network = supernet.extract(row)
    # In the supernet's layout: other layouts round otherwise, and twenty cells in training mode make 1e-3 of 1e-7.
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    supernet.set_active(row)
    logits = supernet(images)
    supernet.load_state_dict(state)  # training mode has moved the running statistics
    if logits.shape != (len(images), space.classes):
        yield f"supernet gives logits of shape {list(logits.shape)} for {space.text(row)}"
        return
    onehots = [F.one_hot(torch.tensor(int(t)), len(c.values)).float() for t, c in zip(row, space.choices)]
    mixed = supernet.forward_mixture(images, onehots)
    supernet.load_state_dict(state)
    if not isinstance(network, GraphNetwork) or network.graph != space.graph(row):
        yield f"extract({space.text(row)}) is not a GraphNetwork of that architecture's graph"
        return
    bound = TOLERANCE * max(1.0, float(logits.abs().max()))
    for what, other in (("the extracted network", network(input_of(network, images))), ("a one-hot mixture", mixed)):
        difference = float((logits - other).abs().max())
        if not difference <= bound:
            yield f"{what} differs from the supernet by {difference:.2g} in {mode} mode for {space.text(row)}"


TOKEN_RULES: tuple[Rule, ...] = (_samples, _canonical, _variation, _extremes, _size, _encoding, _names)
NETWORK_RULES: tuple[Rule, ...] = (_dead_tokens, _drawn_rows, _cost, _features, _graphs, _pickles, _supernet)
