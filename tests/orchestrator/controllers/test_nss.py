"""NSS as a controller: which space is kept, what is proposed, and what a space may cost, against enumeration."""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Observation, Task
from orchestrator.controllers.nss.choice import choose
from orchestrator.controllers.nss.controller import Nss, targets
from orchestrator.controllers.nss.settings import NssOptions
from searchspaces.elite.found import FoundSpace
from searchspaces.elite.space import EliteSpace, restricted
from searchspaces.errors import ConfigError
from searchspaces.expanded.space import ExpandedS16
from searchspaces.space import Tokens
from searchspaces.training.nss import NssSettings
from searchspaces.training.spaces import SpaceCosts, SpaceOfSpaces
from searchspaces.training.weights import WeightSettings

SPACE = ExpandedS16(classes=10, channels=1)
SPACES = SpaceOfSpaces(SPACE)
SIZES = [len(group) for group in SPACES.groups]
EVERY = list(itertools.product(*(range(size) for size in SIZES)))      # 512 spaces


class Latency:
    """In no way additive."""

    def predict(self, tokens_NT: Tokens) -> np.ndarray:
        return np.sqrt(SPACE.cost(tokens_NT)[0] / 1e6) + 0.1


def logits_at(bins: tuple[int, ...], height: float = 30.0) -> list[np.ndarray]:
    return [height * np.eye(size)[b] for size, b in zip(SIZES, bins)]


def test_mean_costs_and_their_range_are_those_of_enumeration() -> None:
    costs = SpaceCosts(SPACES, None, seed=0)
    means = np.array([costs.mean(bins) for bins in EVERY])
    assert costs.reachable() == pytest.approx((means.min(), means.max()))
    assert costs.nearest(1.0) == pytest.approx(means.min()) and costs.nearest(1e12) == pytest.approx(means.max())
    assert costs.nearest(3e6) == 3e6
    bins = (1, 0, 1, 2, 0, 3)
    members = EliteSpace(SPACE, restricted(SPACE, SPACES.groups, [[b] for b in bins]))
    rows = members.widened(members.sample_uniform(np.random.default_rng(0), 20_000))
    madds = SPACE.cost(rows)[0]
    assert costs.mean(bins) == pytest.approx(madds.mean(), abs=4 * madds.std() / math.sqrt(20_000))
    latency = Latency().predict(rows)
    assert SpaceCosts(SPACES, Latency().predict, 0).mean(bins) == pytest.approx(
        latency.mean(), abs=4 * latency.std() / math.sqrt(256))


def test_the_nearest_of_five_draws_is_kept_and_of_equal_ones_the_more_probable() -> None:
    costs = SpaceCosts(SPACES, None, seed=0)
    uniform = [np.zeros(size) for size in SIZES]
    found = choose(costs, uniform, 4e6, "madds", 5, seed=3)
    away = [abs(costs.mean(draw.bins) / 4e6 - 1) for draw in found.draws]
    assert len(away) == 5 and away[found.chosen] == min(away) and found.kept.deviation == pytest.approx(
        costs.mean(found.bins) / 4e6 - 1)
    assert found.kept.log_p == pytest.approx(-math.log(512))
    sure = choose(costs, logits_at((1, 1, 0, 2, 1, 3)), 4e6, "madds", 5, seed=3)
    assert {draw.bins for draw in sure.draws} == {(1, 1, 0, 2, 1, 3)}

    class Flat(SpaceCosts):
        def mean(self, bins: object) -> float:
            return 2.0

    tilted = [np.linspace(0, 1, size) for size in SIZES]
    equal = choose(Flat(SPACES, None, 0), tilted, 2.0, "ms", 12, seed=0)
    assert equal.kept.log_p == max(draw.log_p for draw in equal.draws)


def test_found_spaces_survive_json_and_are_told_in_a_sentence() -> None:
    found = choose(SpaceCosts(SPACES, None, 0), logits_at((0, 0, 1, 3, 1, 1)), 1e3, "madds", 2, seed=0)
    assert FoundSpace.from_json(found.as_json()) == found
    said = found.text(SPACES.groups)
    assert "space for 0.001 M multiply-adds" in said and "no space's mean is nearer" in said
    assert all(f"{group.name} {group.labels[b]}" in said for group, b in zip(SPACES.groups, found.bins))


def controller(seed: int = 0, **options: object) -> Nss:
    task = Task((0.5, 3.0), 40, seed, Latency(), distributions=(
        tuple(logits_at((0, 0, 0, 1, 0, 0))), tuple(logits_at((1, 3, 1, 2, 1, 3)))))
    made = make_controller("nss", SPACE, task, options)
    assert isinstance(made, Nss)
    return made


def inside(found: FoundSpace, row: Tokens) -> bool:
    elite = EliteSpace(SPACE, restricted(SPACE, SPACES.groups, [[b] for b in found.bins]))
    return bool(elite.contains(row[None])[0])


def test_members_of_every_space_are_proposed_in_turn_and_some_networks_of_the_whole_space() -> None:
    made = controller(outside=0.25)
    rows = [proposal.tokens for proposal in made.propose(200)]
    assert len({row.tobytes() for row in rows}) == 200
    shares = [np.mean([inside(found, row) for row in rows]) for found in made.spaces_found()]
    assert shares == pytest.approx([0.375, 0.375], abs=0.02)
    assert [found.target for found in made.found] == [0.5, 3.0] and {found.unit for found in made.found} == {"ms"}


def test_a_replayed_log_goes_on_with_the_same_proposals() -> None:
    one, two = controller(seed=5), controller(seed=5)
    rows = [proposal.tokens for proposal in one.propose(9)]
    trials = [Observation(row, 0.1 + 0.01 * i, float(i + 1)) for i, row in enumerate(rows)]
    one.observe(trials)
    two.observe(trials)
    assert [p.tokens.tolist() for p in one.propose(5)] == [p.tokens.tolist() for p in two.propose(5)]
    best = one.generate([4.0])[0][0]
    assert best.observed and best.accuracy == pytest.approx(0.13)


def test_a_space_with_few_members_gives_way_to_the_rest() -> None:
    made = controller(outside=0.0)
    made.found = made.found[:1]
    rows = [proposal.tokens for proposal in made.propose(4200)]     # the first space has 4096 members
    assert len({row.tobytes() for row in rows}) == 4200


def test_aims_are_budgets_or_multiply_adds() -> None:
    assert targets(NssOptions(), [1.0, 2.0]) == [(1.0, "ms"), (2.0, "ms")]
    options = NssOptions(madds_m=(3.0,))
    assert targets(options, [1.0, 2.0]) == [(3e6, "madds")]
    assert Nss.distributions(options, [1.0, 2.0]) == 1 and Nss.distributions(NssOptions(), [1.0, 2.0]) == 2
    method = Nss.training(options, {"cpu": [1.0]}, WeightSettings(), 1, {})
    assert isinstance(method, NssSettings) and [(a.target, a.label) for a in method.aims] == [(3e6, "")]
    method.check(SPACE)
    with pytest.raises(ConfigError, match=r"madds_m 9000 is out of reach.*lie between .* million"):
        Nss.training(NssOptions(madds_m=(9000.0,)), {"cpu": [1.0]}, WeightSettings(), 1, {}).check(SPACE)  # type: ignore[union-attr]
    models = {"a": Latency(), "b": Latency()}
    aims = Nss.training(NssOptions(), {"a": [1.0, 2.0], "b": [4.0]}, WeightSettings(), 1, models)
    assert isinstance(aims, NssSettings)
    assert [(a.target, a.label) for a in aims.aims] == [(1.0, "a"), (2.0, "a"), (4.0, "b")]


def test_without_a_supernet_it_says_so() -> None:
    with pytest.raises(ConfigError, match="set accuracy: supernet"):
        make_controller("nss", SPACE, Task((1.0,), 10, 0, Latency()), {})


@pytest.mark.parametrize(("options", "words"), [
    ({"draws": 0}, "'draws' of controller nss is 0"), ({"warm_up": 1.0}, "'warm_up' of controller nss is 1.0"),
    ({"mode": "hing"}, "'absolute' or 'hinge'"), ({"madds_m": [-1]}, "madds_m.0' of controller nss is -1"),
    ({"last_temperature": 0}, "'last_temperature'"), ({"sapmles": 3}, "did you mean 'samples'")])
def test_options_that_cannot_work(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_controller("nss", SPACE, Task((1.0,), 10, 0, Latency()), options)
