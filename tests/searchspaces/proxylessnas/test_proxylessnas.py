"""The ProxylessNAS space against the published counts (specification searchspaces 1.2 and 3, unas 11)."""
from __future__ import annotations

import numpy as np
import pytest

from searchspaces.conformance import check_space
from searchspaces.errors import ConfigError, SpaceError
from searchspaces.proxylessnas.space import ProxylessNas, ProxylessNasS16
from searchspaces.vectorfeatures import vector_features

SPACE = ProxylessNas(classes=1000)
PROXYLESS_GPU = ("5x5e3 skip skip skip 7x7e3 skip skip 3x3e3 7x7e6 skip skip 5x5e3 5x5e6 skip 3x3e3 5x5e3 7x7e6 7x7e6 "
                 "7x7e6 5x5e6 7x7e6")
UNAS = ("5x5e3 3x3e3 skip skip 7x7e3 skip skip skip 7x7e3 3x3e3 3x3e3 3x3e3 5x5e3 3x3e3 3x3e3 3x3e3 7x7e6 7x7e3 7x7e3 "
        "7x7e3 7x7e6")


def test_tokens() -> None:
    sizes = SPACE.vocabulary_sizes
    assert len(sizes) == 21 and sorted(sizes) == [6] * 6 + [7] * 15
    assert [position + 1 for position in np.flatnonzero(sizes == 6)] == [1, 5, 9, 13, 17, 21]
    assert SPACE.size() == 7 ** 15 * 6 ** 6 == 221_502_229_807_900_608
    assert SPACE.onehot(SPACE.extremes()).shape == (2, 141)


@pytest.mark.parametrize(("text", "madds", "params"), [(UNAS, 428.0e6, 5.97e6), (PROXYLESS_GPU, 465.3e6, 7.12e6)])
def test_published_networks(text: str, madds: float, params: float) -> None:
    row = SPACE.parse(text)
    assert SPACE.text(row) == text
    counted = SPACE.cost(row[None])
    assert counted[0][0] == pytest.approx(madds, abs=0.05e6) and counted[1][0] == pytest.approx(params, abs=0.005e6)
    graph = SPACE.graph(row)
    assert (graph.madds, graph.params) == (counted[0][0], counted[1][0])


def test_extremes_have_the_specified_cost() -> None:
    madds, params = SPACE.cost(SPACE.extremes())
    assert madds == pytest.approx([182.5e6, 1036.7e6], abs=0.05e6)
    assert params == pytest.approx([3.30e6, 8.38e6], abs=0.005e6)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_small_variant_keeps_the_contract(shared: bool) -> None:
    assert check_space(ProxylessNasS16(shared=shared)) == []


def test_sharing_changes_no_network() -> None:
    assert ProxylessNasS16(shared=True).space_id == ProxylessNasS16(shared=False).space_id


def test_bad_options_and_texts() -> None:
    with pytest.raises(ConfigError, match="width of proxylessnas is 9"):
        ProxylessNas(width=9)
    with pytest.raises(ConfigError, match="strides of proxylessnas"):
        ProxylessNas(stage_strides=(3,))
    with pytest.raises(SpaceError, match="21 layers"):
        SPACE.parse(UNAS.replace("7x7e6", "9x9e6"))


def test_cost_and_latency_features_add_up_to_those_of_the_graphs() -> None:
    space = ProxylessNasS16()
    rows = np.concatenate([space.extremes(), space.sample_uniform(np.random.default_rng(0), 20)])
    graphs = [space.graph(row) for row in rows]
    assert np.array_equal(space.cost(rows), [[graph.madds for graph in graphs], [graph.params for graph in graphs]])
    features = space.latency_features(rows)
    assert np.allclose(features[:, :5], [vector_features(graph) for graph in graphs], rtol=1e-6)
    assert features[0, 5:].tolist() == [1] * 5 and features[1, 5:].tolist() == [4] * 5
    assert space.kept_layers(SPACE.parse(UNAS)[None]).tolist() == [[2, 1, 4, 4, 4, 1]]  # 16 of 21
    assert space.features(rows).shape == (22, 148)


def test_mutation_and_crossover_respect_vocabularies_of_two_sizes() -> None:
    rng = np.random.default_rng(0)
    rows = SPACE.sample_uniform(rng, 500)
    changed = SPACE.check_tokens(SPACE.mutate(rng, rows, 0.0))
    assert ((changed != rows).sum(axis=1) == 1).all()
    assert set(np.nonzero(changed != rows)[1]) == set(range(21))
    crossed = SPACE.check_tokens(SPACE.crossover(rng, rows, rows[::-1]))
    assert ((crossed == rows) | (crossed == rows[::-1])).all()
