"""How GPUs are shared: the arithmetic, and a Ray that pretends to have one (pretendgpu.py)."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import SearchSettings, SupernetSettings, load_config, parse_config
from orchestrator.resources.gpus import PER_GPU, GpuOffer, places, rollout_share, share, supernet_share, trainer_share
from orchestrator.resources.team import Team, most_cpus, supernet_team
from searchspaces.errors import ClusterError, ConfigError

ROOT = Path(__file__).parents[3]
NONE, ONE, EIGHT = GpuOffer(0, 0), GpuOffer(1, 1), GpuOffer(8, 4)


def pretend(folder: Path, *arguments: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-m", "tests.orchestrator.cluster.pretendgpu", str(folder), *arguments],
                         cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                         timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    facts: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return facts


@pytest.mark.parametrize("gpus", [0.5, 1, 2, 3, 8])
@pytest.mark.parametrize("workers", range(1, 12))
def test_everybody_finds_a_place_and_shares_are_as_large_as_can_be(workers: int, gpus: float) -> None:
    each = share(workers, gpus)
    per_gpu = math.floor(min(gpus, 1.0) / each + 1e-9)
    assert 0 < each <= 1 and per_gpu * max(1, math.floor(gpus)) >= workers
    larger = 1.0 / (per_gpu - 1) if per_gpu > 1 else 2.0     # one place less on every GPU
    assert gpus < 1 or larger > 1 or math.floor(1.0 / larger) * math.floor(gpus) < workers


def test_auto_takes_what_there_is() -> None:
    assert share(3, 0.0) == 0.0 and share(1, 8.0) == 1.0
    # supernet and rollout workers: apart where there is room, else on the same GPU
    assert supernet_share("auto", 1, "auto", NONE) == 0.0 and rollout_share("auto", 4, 0.0, NONE) == 0.0
    assert supernet_share("auto", 1, "auto", ONE) == 0.5 and rollout_share("auto", 4, 0.5, ONE) == 0.125
    assert supernet_share("auto", 1, 0.0, ONE) == 1.0
    assert supernet_share("auto", 4, "auto", EIGHT) == 1.0 and rollout_share("auto", 16, 4.0, EIGHT) == 0.25
    assert supernet_share("auto", 8, "auto", EIGHT) == 0.5
    # trainers: no more than PER_GPU on each
    assert trainer_share("auto", 100, NONE) == 0.0 and trainer_share("auto", 2, ONE) == 0.5
    assert trainer_share("auto", 100, ONE) == 1 / PER_GPU and places(1 / PER_GPU, ONE) == PER_GPU
    assert trainer_share("auto", 8, EIGHT) == 1.0 and places(1.0, EIGHT) == 8
    assert places(0.3333, ONE) == 3 and places(0.3, EIGHT) == 24 and places(2.0, EIGHT) == 4


def team(cores: int, offer: GpuOffer = NONE, **section: Any) -> Team:
    return supernet_team(SupernetSettings(**section), SearchSettings(), cores, offer)


def test_a_team_uses_all_cores_and_its_parts_follow_from_the_configuration() -> None:
    assert team(2) == Team(2, 2, 1) and team(1) == Team(2, 1, 1) and team(-1) == Team(2, 1, 1)
    assert team(2, batch_size=63) == team(64, batch_size=63) == Team(1, 1, 1)
    assert team(8) == Team(2, 2, 4) and team(64) == Team(2, 2, 4) and team(64, cpus=1) == Team(2, 2, 1)
    assert team(4, batch_size=512, cpus=2) == Team(16, 2, 2) and team(400, batch_size=65_536) == Team(16, 16, 4)
    assert team(3, batch_size=128) == Team(4, 2, 1), "three would wait for the one that does two parts"
    assert team(2, parts=1) == Team(1, 1, 1) and team(8, parts=8) == Team(8, 8, 1)
    assert team(2, workers=4) == Team(4, 4, 1), "asked for, so cut further"
    assert team(2, workers=4, parts=3) == Team(3, 3, 1)
    for cores in range(1, 40):
        for batch_size in (32, 64, 96, 256, 1024):
            made = team(cores, batch_size=batch_size)
            assert made.parts == team(1, batch_size=batch_size).parts and made.workers * made.cpus <= cores
            assert made.workers * made.cpus <= most_cpus(SupernetSettings(batch_size=batch_size), cores)
    assert most_cpus(SupernetSettings(workers=4, cpus=2), 2) == 8 and most_cpus(SupernetSettings(workers=4), 2) == 4


def test_a_team_takes_gpus_first_with_larger_parts() -> None:
    assert team(16, ONE) == Team(1, 1, 1, 0.5) and team(16, EIGHT) == Team(1, 1, 1, 1.0)
    assert team(16, EIGHT, batch_size=1024) == Team(4, 4, 1, 1.0)
    assert team(16, EIGHT, batch_size=1024, gpus=0) == Team(16, 16, 1)
    assert team(16, ONE, batch_size=512, gpus=0.25) == Team(2, 2, 1, 0.25)
    assert team(16, EIGHT, workers=4) == Team(4, 4, 1, 1.0)


def test_numbers_are_taken_as_they_are_or_refused() -> None:
    assert supernet_share(0.25, 2, "auto", ONE) == 0.25 and rollout_share(0.0, 2, 1.0, ONE) == 0.0
    with pytest.raises(ClusterError, match="supernet.gpus asks for 1 GPU per worker and no node .* than 0; lower it"):
        supernet_share(1.0, 1, "auto", NONE)
    with pytest.raises(ClusterError, match="search.gpus asks for 0.5 GPU"):
        rollout_share(0.5, 2, 0.0, NONE)
    with pytest.raises(ClusterError, match="accuracy.gpus asks for 5 GPU per worker and no node .* more than 4"):
        trainer_share(5.0, 1, EIGHT)
    with pytest.raises(ClusterError, match="accuracy.gpus asks for 1.5 GPU per worker; above 1 only whole"):
        trainer_share(1.5, 1, EIGHT)


def test_what_a_cluster_offers() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"GPU": 2.0}},
             {"Alive": True, "Resources": {"GPU": 1.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    assert GpuOffer.of_nodes(nodes) == GpuOffer(3.0, 2.0) and GpuOffer.of_nodes([]) == NONE


def test_settings() -> None:
    default = parse_config({}, "test")
    assert default.supernet.gpus == default.search.gpus == "auto"
    assert parse_config({"supernet": {"gpus": 0.5}, "search": {"gpus": 0}}, "test").supernet.gpus == 0.5
    assert load_config(ROOT / "configs" / "fnas_digits.yaml", ["accuracy.gpus=2"]).accuracy.gpus == 2  # type: ignore[union-attr]
    for wrong in ("many", -1):
        with pytest.raises(ConfigError, match="supernet.gpus"):
            parse_config({"supernet": {"gpus": wrong}}, "test")


@pytest.mark.slow
def test_one_gpu_is_measured_trained_on_and_searched_with_in_turns(tmp_path: Path) -> None:
    facts = pretend(tmp_path)
    shares = facts["shares"]
    assert shares["free_while_measuring"] == shares["free_while_measuring_again"] == 0.0    # a whole one, alone
    assert shares["free_while_training"] == 0.5 and shares["free_while_searching"] == 0.0
    assert shares["supernet_device"] == "cpu"           # torch cannot use what Ray pretends to have
    assert shares["evaluated"] and shares["measured"]
    assert shares["trainers"] == [3, 0.3333] and shares["free_at_the_end"] == 1.0
    # what workers with a GPU, half a one, and none are told
    told = facts["told"]
    assert [told[gpus]["device_with_cuda"] for gpus in ("1", "0.5", "0")] == ["cuda", "cuda", "cpu"]
    assert [told[gpus]["device_here"] for gpus in ("1", "0.5", "0")] == ["cpu"] * 3
    assert told["1"]["cuda_target"] == "measures"
    for gpus in ("0.5", "0"):
        assert told[gpus]["cuda_target"] == (
            f"TargetError: target cuda measures on exactly one whole GPU and this worker was given {gpus}; claim it "
            "with num_gpus=1, never a fraction")


@pytest.mark.soak
def test_a_whole_search_that_measures_on_the_only_gpu(tmp_path: Path) -> None:
    assert pretend(tmp_path, "search") == {"delivered": [True, True], "free": 1.0}
