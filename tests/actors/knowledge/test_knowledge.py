"""The knowledge pool: matching, fairness rules, who may share a pool, and the actor."""
from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray

from actors.knowledge.entry import Entry
from actors.knowledge.pool import KnowledgePool, KnowledgeService
from actors.knowledge.rules import USUAL_GATE, Gate, GateSettings, best_match, similarity
from searchspaces.errors import StoreError
from searchspaces.graph import Block
from searchspaces.mnas.space import MnasS16, MnasS32
from searchspaces.network import GraphNetwork
from searchspaces.trained.adaptation import inherit
from tests.actors.knowledge.knowledgeprocess import (
    BASE,
    EPOCHS,
    QUERIES,
    SPACE,
    Row,
    check_marks,
    insert,
    marked,
    other,
    rows,
)

WINDOW = USUAL_GATE.window


@pytest.fixture
def row() -> Row:
    return BASE.copy()


@pytest.fixture
def pool(tmp_path: Path) -> KnowledgePool:
    return KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)


# --- matching --------------------------------------------------------------------------------------------------------


def entry(key: tuple[int, ...], stage: int = 0, lineage: int = 10, written_ns: int = 0, kind: str = "") -> Entry:
    return Entry(stage, kind, key, f"{stage}{kind}{key}", "", 1, lineage, 10, written_ns)


def block(key: tuple[int, ...], stage: int = 0, name: str = "block0") -> Block:
    return Block(name, stage, "", {}, (), 0, 0, (), key)


def match(wanted: Block, *entries: Entry) -> Entry | None:
    return best_match(wanted, {e.block: e for e in entries})


def test_similarity_is_the_cosine_of_concatenated_one_hots() -> None:
    def one_hots(tokens: tuple[int, ...]) -> NDArray[np.float64]:
        return np.eye(4)[list(tokens)].ravel()

    query = (0, 1, 1, 2, 0, 1)
    for stored, expected in (((0, 1, 1, 2, 1, 0), 4 / 6), ((0, 1, 1, 2, 0, 0), 5 / 6), (query, 1.0)):
        a, b = one_hots(query), one_hots(stored)
        assert similarity(query, stored) == pytest.approx(expected)
        assert similarity(query, stored) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_five_of_six_tokens_are_a_hit_and_four_are_not() -> None:
    query = block((0, 0, 0, 0, 0, 0))
    five, four = entry((0, 0, 1, 0, 0, 0)), entry((0, 0, 1, 1, 0, 0))
    assert match(query, four, five) == five
    assert match(query, four) is None
    assert match(query, entry((0, 0, 0, 0, 0, 0)), five) == entry((0, 0, 0, 0, 0, 0))


def test_only_blocks_of_the_same_stage_and_keyless_ones_of_the_same_kind_match() -> None:
    assert match(block((1, 1), stage=2), entry((1, 1), stage=3)) is None
    stem = entry((), -1, kind="stem")
    assert match(block((), -1, "stem"), stem) == stem
    assert match(block((), -1, "head"), stem) is None


def test_ties_go_to_the_lineage_nearest_to_the_median_then_to_the_most_recent() -> None:
    query = block((0, 0, 0))
    crowd = [entry((), -1, lineage=20, kind=name) for name in ("stem", "final", "head")]
    old, new, deep = (entry((0, 0, 1), lineage=20, written_ns=1), entry((0, 1, 0), lineage=20, written_ns=2),
                      entry((1, 0, 0), lineage=50, written_ns=3))
    assert match(query, old, new, deep, *crowd) == new
    assert match(query, old, deep, *crowd) == old


def test_a_start_brings_the_stored_block_and_its_lineage(pool: KnowledgePool, row: Row) -> None:
    insert(pool, row, 30)
    near, far = other(row, (2, 1)), other(row, (2, 1), (2, 2))
    start = pool.start(near, active=True)
    assert (start.hits, start.queries, check_marks(start)) == (QUERIES, QUERIES, 10)
    assert start.lineage == (30,) * 10
    source = start.sources[3]
    assert source is not None and source.stage == 2 and source.similarity == pytest.approx(5 / 6)
    assert source.key == tuple(row[12:18]) and "layer0.depthwise.weight" in source.weights
    start = pool.start(far, active=True)
    assert (start.hits, start.queries) == (QUERIES - 1, QUERIES)
    assert start.sources[3] is None and start.lineage == (30, 30, 30, 0, *[30] * 6)


def test_stored_channels_are_in_order_of_importance(pool: KnowledgePool, row: Row) -> None:
    torch.manual_seed(0)
    network = GraphNetwork(SPACE.graph(row))
    pool.insert(row, {name: tensor.numpy() for name, tensor in network.state_dict().items()}, 10, [10] * 10)
    source = pool.start(row, active=True).sources[2]
    assert source is not None
    norms = np.abs(source.weights["layer1.project.weight"]).sum(axis=(0, 2, 3))
    assert (np.diff(norms) <= 0).all() and norms[0] > norms[-1]


def test_a_network_from_its_own_entry_computes_the_same(pool: KnowledgePool) -> None:
    torch.manual_seed(0)
    tokens = rows(1, seed=5)[0]
    source = GraphNetwork(SPACE.graph(tokens)).eval()
    pool.insert(tokens, {name: tensor.numpy() for name, tensor in source.state_dict().items()}, 10, [10] * 10)
    heir = GraphNetwork(SPACE.graph(tokens)).eval()
    images = torch.randn(2, *source.graph.input_shape)
    with torch.no_grad():
        assert not torch.allclose(heir(images), source(images), rtol=1e-3)
        inherit(heir, pool.start(tokens, active=True).sources)
        torch.testing.assert_close(heir(images), source(images), rtol=1e-3, atol=1e-5)


# --- the fairness gate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("misses", "on"), [(2, True), (3, False)])
def test_the_gate_opens_at_99_percent_of_the_last_200_queries(misses: int, on: bool) -> None:
    gate = Gate(None)
    gate.record([False] * 500)                          # forgotten by then
    gate.record([True] * (WINDOW - 10) + [False] * misses + [True] * (9 - misses))
    assert not gate.on                                  # one of the old misses is still among the last 200
    gate.record([True])
    assert gate.on is on and gate.hit_ratio == (WINDOW - misses) / WINDOW
    assert on == (gate.hit_ratio >= USUAL_GATE.least_hits)


def test_the_gate_needs_a_full_window_and_stays_open() -> None:
    gate = Gate(None)
    gate.record([True] * (WINDOW - 1))
    assert not gate.on
    gate.record([True])
    assert gate.on
    gate.record([False] * WINDOW)
    assert gate.on and gate.hit_ratio == 0


def test_a_search_starts_cold_and_counts_its_queries(pool: KnowledgePool, row: Row) -> None:
    insert(pool, row, 1)
    for number in range(-(-WINDOW // QUERIES)):
        start = pool.start(row)
        assert not start.active and start.hits == QUERIES and set(start.sources) == {None}, f"start {number}"
        assert start.lineage == (0,) * 10
    assert pool.ready()
    assert pool.start(row).active and not pool.start(row, active=False).active


def test_window_and_hits_can_be_told() -> None:
    gate = Gate(None, GateSettings(window=10, least_hits=0.8))
    gate.record([False] * 3 + [True] * 7)
    assert not gate.on
    gate.record([True])
    assert gate.on


def test_no_batch_mixes_warm_and_cold_starts(tmp_path: Path, row: Row) -> None:
    """The pool gets ready in the middle of batch 0, whose last architecture starts after batch 1 and a restart."""
    folder, gate = tmp_path / "pool", tmp_path / "gate.json"
    pool = KnowledgePool(folder, SPACE, EPOCHS, gate_file=gate)
    insert(pool, row, 1)
    late, next_one, later = other(row, (2, 1)), other(row, (3, 1)), other(row, (4, 1))
    assert not pool.begin_batch(0, np.stack([row, late]))
    for _ in range(40):
        assert not pool.start(row).active
    assert pool.ready()
    assert pool.start(later).active, "it belongs to no batch"
    assert pool.begin_batch(1, next_one[None])
    assert (pool.start(next_one).active, pool.start(next_one).batch) == (True, 1)
    for again in (pool, KnowledgePool(folder, SPACE, EPOCHS, gate_file=gate)):
        assert (again.start(late).active, again.start(late).batch) == (False, 0)
        assert not again.begin_batch(0, late[None]) and not again.start(late).active, "the first word counts"
        assert again.begin_batch(2, later[None]) and again.start(later).active


def test_a_search_goes_on_with_its_window_and_the_next_search_has_its_own(tmp_path: Path, row: Row) -> None:
    folder, gate = tmp_path / "pool", tmp_path / "run" / "knowledge.json"
    first = KnowledgePool(folder, SPACE, EPOCHS, gate_file=gate)
    insert(first, row, 1)
    for _ in range(40):
        first.start(row)
    again = KnowledgePool(folder, SPACE, EPOCHS, gate_file=gate)
    assert again.ready() and again.statistics()["queries"] == WINDOW
    second = KnowledgePool(folder, SPACE, EPOCHS, gate_file=tmp_path / "run2" / "knowledge.json")
    assert not second.ready() and second.start(row).hits == QUERIES


def test_a_damaged_window_is_counted_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gate.json").write_bytes(b'{"recent": [1, 1')
    gate = Gate(tmp_path / "gate.json")
    assert not gate.recent and "damaged" in caplog.text


# --- what goes in ----------------------------------------------------------------------------------------------------


def test_lineages_add_up_along_the_chain_and_their_spread_is_reported(pool: KnowledgePool, row: Row) -> None:
    graph = SPACE.graph(row)
    for _ in range(3):
        start = pool.start(row, active=True)
        pool.insert(row, marked(graph, 1), 10, [before + 10 for before in start.lineage])
    insert(pool, other(row, (0, 0), (0, 1), (0, 2)), 10)      # one block of its own, and nine it overwrites
    statistics = pool.statistics()
    assert [statistics[f"lineage_{name}"] for name in ("smallest", "median", "largest")] == [10, 10, 30]
    assert pool.start(row, active=True).lineage == (10, 30, *[10] * 8)


def test_weights_that_are_not_finite_or_not_of_this_network_stay_out(pool: KnowledgePool, row: Row) -> None:
    weights = marked(SPACE.graph(row), 1)
    assert not pool.insert(row, weights | {"stem.conv.weight": weights["stem.conv.weight"] * np.nan}, 10, [10] * 10)
    with pytest.raises(StoreError, match=r"depthwise\.weight has shape \((\d+), 1, 3, 3\), .* has \(\1, 1, 5, 5\)"):
        pool.insert(other(row, (1, 1)), weights, 10, [10] * 10)
    del weights["stem.conv.weight"]
    with pytest.raises(StoreError, match=r"stem\.conv\.weight has shape None"):
        pool.insert(row, weights, 10, [10] * 10)
    assert pool.statistics()["entries"] == 0


# --- who may share a pool --------------------------------------------------------------------------------------------


def test_another_number_of_epochs_is_another_pool(tmp_path: Path, pool: KnowledgePool, row: Row) -> None:
    insert(pool, row, 1)
    assert KnowledgePool(tmp_path / "pool", SPACE, EPOCHS + 1).start(row).hits == 0
    assert KnowledgePool(tmp_path / "pool", SPACE, EPOCHS).start(row).hits == QUERIES


def test_another_space_is_refused_in_one_sentence(tmp_path: Path, pool: KnowledgePool) -> None:
    with pytest.raises(StoreError, match="holds blocks of mnas.*not of mnas.*name another folder") as refusal:
        KnowledgePool(tmp_path / "pool", MnasS32(), EPOCHS)
    assert "\n" not in str(refusal.value)


def test_another_task_shares_all_but_the_classifier(tmp_path: Path, pool: KnowledgePool, row: Row) -> None:
    insert(pool, row, 3)
    colour = MnasS16(classes=100, channels=3)
    start = KnowledgePool(tmp_path / "pool", colour, EPOCHS).start(row, active=True)
    assert start.hits == QUERIES
    torch.manual_seed(0)
    network = GraphNetwork(colour.graph(row))
    fresh = network.state_dict()["head.linear.weight"].clone()
    inherit(network, start.sources)
    assert torch.equal(network.state_dict()["head.linear.weight"], fresh)
    assert (network.state_dict()["block3.layer0.project.weight"] == 3).all()


# --- the actor -------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=1)
def train_elsewhere(actor: Any, tokens: Row) -> tuple[bool, int]:
    """A trainer that has nothing but the handle."""
    start = ray.get(actor.start.remote(tokens), timeout=30)
    graph = SPACE.graph(tokens)
    ray.get(actor.insert.remote(tokens, marked(graph, 5), 5, [before + 5 for before in start.lineage]), timeout=30)
    return start.active, start.hits


@pytest.mark.usefixtures("ray_local")
def test_the_actor_comes_back_with_everything(tmp_path: Path, row: Row) -> None:
    service = KnowledgeService(tmp_path / "pool", SPACE, EPOCHS, gate_file=tmp_path / "gate.json")
    try:
        assert ray.get(train_elsewhere.remote(service.actor, row), timeout=60) == (False, 0)
        ray.get([service.actor.start.remote(row) for _ in range(40)], timeout=60)
        before = ray.get(service.actor.statistics.remote(), timeout=30)
        pid = ray.get(service.actor.pid.remote(), timeout=30)
        os.kill(pid, signal.SIGKILL)
        assert ray.get(service.actor.ready.remote(), timeout=60)
        assert ray.get(service.actor.pid.remote(), timeout=30) != pid
        assert ray.get(service.actor.statistics.remote(), timeout=30) == before
        start = ray.get(service.actor.start.remote(row), timeout=30)
        assert start.active and start.lineage == (5,) * 10 and check_marks(start) == 10
        network = GraphNetwork(SPACE.graph(row))
        inherit(network, start.sources)                 # from read-only memory that all readers share
        assert (network.state_dict()["block2.layer0.expand.weight"] == 5).all()
    finally:
        service.close()


@pytest.mark.usefixtures("ray_local")
def test_the_service_refuses_another_space_before_it_starts(tmp_path: Path, pool: KnowledgePool) -> None:
    with pytest.raises(StoreError, match="name another folder"):
        KnowledgeService(tmp_path / "pool", MnasS32(), EPOCHS)
