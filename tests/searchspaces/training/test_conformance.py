"""Every training method keeps the contract; the suite finds methods that do not."""
from __future__ import annotations

from dataclasses import replace

import pytest

from searchspaces.supernet import Supernet
from searchspaces.training.conformance import check_method
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.nss import NssSettings, SpaceAim
from searchspaces.training.sandwich import SandwichSettings, SandwichTraining
from searchspaces.training.training import Schedule, TrainingMethod
from searchspaces.training.unas import UnasSettings
from tests.actors.tinyspace import TinySpace, TinyWithMean

AIMS = (Aim("cpu", 3.0), Aim("cpu", 4.0), Aim("gpu", 2.0))
UNAS = UnasSettings(AIMS, latency=LatencySettings(networks=5, samples=4), warm_up=0.25)
NSS = NssSettings((SpaceAim(2.0, "cpu"), SpaceAim(9e3)), latency={"cpu": lambda rows_NT: 1.0 + rows_NT.sum(axis=1)})


@pytest.mark.parametrize("method", [
    SandwichSettings(), SandwichSettings(sampler="fair"), UNAS, UnasSettings(AIMS[:1], weights_at="hard", warm_up=0.0),
    UnasSettings(AIMS, latency=LatencySettings(weight=0.0), objective="validation", architectures=2)])
def test_methods_keep_the_contract(method: TrainingMethod) -> None:
    assert check_method(method, TinySpace()) == []


@pytest.mark.parametrize("method", [
    NSS, replace(NSS, hard=True, warm_up=0.0, full=False), replace(NSS, task_weight=0.0, hinge=True)])
def test_nss_keeps_the_contract(method: TrainingMethod) -> None:
    assert check_method(method, TinyWithMean()) == []


class Forgetful(SandwichTraining):
    """Draws from torch's global random state and forgets where it was."""

    def state_dict(self):  # type: ignore[no-untyped-def]
        return {name: value for name, value in super().state_dict().items() if not name.startswith("momentum")}


class ForgetfulSettings(SandwichSettings):
    def start(self, supernet: Supernet, schedule: Schedule) -> SandwichTraining:
        return Forgetful(supernet, self, schedule)


def test_a_training_that_forgets_is_found() -> None:
    assert any("restored" in problem for problem in check_method(ForgetfulSettings(), TinySpace()))
