"""Cells, costs and the published table (specification section 7)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from searchspaces.errors import SpaceError
from searchspaces.nasbench201.space import CONV1, CONV3, EDGES, NONE, OPERATIONS, POOL, SKIP, NasBench201
from searchspaces.nasbench201.supernet import Edge
from searchspaces.network import GraphNetwork

ROW_0 = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
SPACE = NasBench201()


def test_checked_costs() -> None:
    madds, params = SPACE.cost(SPACE.all_tokens())
    assert len(set(zip(madds.tolist(), params.tolist()))) == 28
    assert (madds.min(), params.min()) == (7_783_040, 73_306)
    assert (madds.max(), params.max()) == (220_119_680, 1_531_546)
    assert [int(v[0]) for v in SPACE.cost(SPACE.parse(ROW_0)[None])] == [15_647_360, 129_306]


def test_cost_equals_the_graph_also_on_dead_paths() -> None:
    for row in [*SPACE.sample_uniform(np.random.default_rng(0), 6), np.array([NONE, NONE, CONV3, NONE, NONE, CONV1])]:
        graph = SPACE.graph(row)
        assert [int(v[0]) for v in SPACE.cost(row[None])] == [graph.madds, graph.params]


def test_text_both_ways() -> None:
    assert SPACE.text(SPACE.parse(ROW_0)) == ROW_0
    assert SPACE.parse(ROW_0).tolist() == [POOL, CONV1, SKIP, CONV1, SKIP, SKIP]
    for text in ("", ROW_0[:-20], ROW_0.replace("avg", "max"), ROW_0.replace("~2", "~3")):
        with pytest.raises(SpaceError):
            SPACE.parse(text)


def test_size_and_index() -> None:
    rows = SPACE.all_tokens()
    assert SPACE.size() == len(rows) == 15_625
    assert (SPACE.row_index(rows) == np.arange(15_625)).all()


def test_341_cells_are_disconnected() -> None:
    assert int((~SPACE.on_path(SPACE.all_tokens()).any(axis=1)).sum()) == 341


def test_paths_by_brute_force() -> None:
    paths = [(3,), (0, 4), (1, 5), (0, 2, 5)]  # edge indices of every way from node 0 to node 3
    assert all(EDGES[a][1] == EDGES[b][0] for path in paths for a, b in zip(path, path[1:]))
    rows = SPACE.sample_uniform(np.random.default_rng(1), 300)
    for row, found in zip(rows, SPACE.on_path(rows)):
        live = {edge for path in paths if all(row[e] != NONE for e in path) for edge in path}
        assert set(np.flatnonzero(found)) == live


def test_latency_features_ignore_what_leads_nowhere() -> None:
    dead_end = np.array([CONV3, CONV3, NONE, SKIP, NONE, NONE], dtype=np.int8)
    skip_only = np.array([NONE, NONE, NONE, SKIP, NONE, NONE], dtype=np.int8)
    chain = np.array([CONV3, NONE, CONV1, SKIP, NONE, POOL], dtype=np.int8)
    features = SPACE.latency_features(np.stack([dead_end, skip_only, chain]))
    assert (features[0] == features[1]).all()
    assert features[2].tolist() == [1, 1, 1, 1, 1, 3, 1, 1]


def test_the_network_computes_the_cell() -> None:
    """A cell with one skip edge is the identity, so the stem's output reaches the first reduction unchanged."""
    torch.manual_seed(0)
    skip = NasBench201(width=4, cells=1, resolution=8)
    both = np.array([NONE, NONE, NONE, SKIP, NONE, NONE], dtype=np.int8)
    doubled = np.array([SKIP, NONE, NONE, SKIP, SKIP, NONE], dtype=np.int8)  # node 3 = x + node 1 = 2 x
    one, two = (GraphNetwork(skip.graph(row)).eval() for row in (both, doubled))
    two.load_state_dict(one.state_dict())
    images = torch.randn(3, 3, 8, 8)
    seen: dict[str, torch.Tensor] = {}
    for name, network in (("one", one), ("two", two)):
        network.get_submodule("reduction1.shortcut").register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0]))
        assert network(images).shape == (3, 10)
    assert torch.allclose(seen["two"], 2 * seen["one"])


def test_a_supernet_edge_is_the_weighted_sum_of_its_operations() -> None:
    torch.manual_seed(0)
    supernet = NasBench201(width=4, cells=1, resolution=8).make_supernet()
    edge = supernet.get_submodule("stage0.cell0.0_1")
    assert isinstance(edge, Edge)
    edge.eval()
    x, weights = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    expected = sum((weights[token] * edge(x, token) for token in (SKIP, CONV1, CONV3, POOL)), torch.zeros_like(x))
    assert torch.allclose(edge.mixture(x, weights), expected, atol=1e-6)
    assert torch.allclose(edge(x, SKIP), x) and not torch.allclose(edge(x, CONV1), edge(x, CONV3), atol=1e-2)
    cell_tensors = [name for name in supernet.state_dict() if ".cell" in name]
    assert not any(name.endswith(("bn.weight", "bn.bias")) for name in cell_tensors)  # no affine while sharing


def test_published_table(shared_data: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data / "nasbench201.parquet")
    columns = [name for name in table.column_names if name.startswith("op_")]
    tokens = np.stack([table[name].to_numpy() for name in columns], axis=1).astype(np.int8)
    assert sorted(SPACE.row_index(tokens).tolist()) == list(range(15_625))
    assert SPACE.text(tokens[0]) == ROW_0
    best = tokens[9930]  # CIFAR-100 optimum: all 3x3 except a skip on edge 0->3
    assert best.tolist() == [CONV3, CONV3, CONV3, SKIP, CONV3, CONV3]
    assert OPERATIONS[best[3]] == "skip_connect"


def test_blind_are_exactly_the_networks_that_answer_every_image_alike() -> None:
    space = NasBench201(cells=1, width=4, resolution=8)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    some = [[NONE] * 6, [CONV3, CONV3, NONE, NONE, NONE, NONE], [NONE, NONE, NONE, SKIP, NONE, NONE],
            [NONE, NONE, CONV3, NONE, CONV1, POOL], [SKIP, NONE, NONE, NONE, CONV1, NONE]]
    rows = np.concatenate([np.array(some, dtype=np.int8), space.sample_uniform(np.random.default_rng(1), 12)])
    torch.manual_seed(0)
    with torch.inference_mode():
        alike = [bool(torch.equal(*GraphNetwork(space.graph(row)).eval()(images))) for row in rows]
    assert space.blind(rows).tolist() == alike
    assert alike[:5] == [True, True, False, True, False]
    assert SPACE.blind(SPACE.all_tokens()).sum() == 341
