"""The CPU target on this machine's CPU: conformance, what a sample holds, affinity, refusals. No assertion on times."""
from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from actors.targets import onnx_cpu
from actors.targets.catalogue import make_target
from actors.targets.conformance import check_target
from actors.targets.host import ForeignLoad
from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.pairing import median_stderr, paired_ratios
from actors.targets.reference import graph_hash, reference_graph
from actors.targets.target import LatencySample, Workload
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError, TargetError
from searchspaces.onnxgraph import to_onnx
from searchspaces.onnxpixels import Pixels

pytestmark = pytest.mark.alone
SHAPE = (3, 16, 16)
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")


@pytest.fixture
def target() -> Iterator[OnnxCpuTarget]:
    made = OnnxCpuTarget(SHAPE, reference_ms=2.0)
    yield made
    made.close()


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.fixture
def busy_host() -> Iterator[None]:
    workers = [multiprocessing.get_context("spawn").Process(target=spin, args=(60.0,), daemon=True)
               for _ in range(max(1, math.ceil(0.6 * (os.cpu_count() or 1))))]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 30.0
    while True:     # until the new processes have started spinning
        load = ForeignLoad()
        time.sleep(0.3)
        if load.share() > 1.2 * onnx_cpu.BUSY_LOAD:
            break
        assert time.monotonic() < deadline, "the load never showed"
    yield
    for worker in workers:
        worker.terminate()
        worker.join(timeout=10.0)


def test_conformance() -> None:
    assert check_target(OnnxCpuTarget(SHAPE)) == []


class TimesNothing(OnnxCpuTarget):
    """Breaks three promises."""

    def measure(self, handles: object) -> list[LatencySample]:
        samples = super().measure(handles)      # type: ignore[arg-type]
        return [replace(sample, ratio=1.5, stderr=0.0, target_id="other") for sample in samples]


def test_conformance_finds_what_is_wrong() -> None:
    problems = " | ".join(check_target(TimesNothing(SHAPE)))
    for part in ("a sample says target other", "is not ratio * reference_ms", "the reference network timed as a cand"):
        assert part in problems


def test_sample_holds_all_it_is_made_of(target: OnnxCpuTarget) -> None:
    sample = target.measure(target.prepare([Workload(graph=reference_graph(3, 16))]))[0]
    ratios = paired_ratios(sample.reference_ms_rounds, sample.candidate_ms)
    assert sample.ratio == pytest.approx(np.median(ratios)) and sample.stderr == pytest.approx(median_stderr(ratios))
    assert sample.latency_ms == pytest.approx(2.0 * sample.ratio) and sample.reference_ms == 2.0
    assert 6 <= sample.rounds == len(ratios) <= 30
    assert sample.target_id == target.identity().target_id and 0.0 <= sample.load <= 1.0
    assert abs(sample.started_at + sample.duration_s - time.time()) < 3600.0
    assert {"core", "session_ms", "clock_mhz", "governor"} <= sample.details.keys()
    assert sample.details["clock_mhz"] is None or 100 < sample.details["clock_mhz"] < 10_000


def test_identity_is_that_of_the_device_and_its_settings() -> None:
    targets = [OnnxCpuTarget(SHAPE, 1.0), OnnxCpuTarget(SHAPE, 2.0, core=min(os.sched_getaffinity(0))),
               OnnxCpuTarget((3, 32, 32), 1.0), OnnxCpuTarget(SHAPE, 1.0, batch=2),
               OnnxCpuTarget(SHAPE, 1.0, reference=reference_graph(3, 8))]
    for made in reversed(targets):  # each gives back the core it found
        made.close()
    ids = [made.identity().target_id for made in targets]
    assert ids[0] == ids[1] and len(set(ids)) == 4
    assert targets[0].identity().device and "onnxruntime" in targets[0].identity().runtime


def test_shipped_reference_does_not_change_unnoticed() -> None:
    """A change makes all stored latencies incomparable; do it deliberately and update these."""
    assert [graph_hash(reference_graph(3, size)) for size in (32, 224)] == ["51948e164618", "4e9daa71435f"]


@needs_affinity
def test_core_is_held_and_given_back() -> None:
    before = os.sched_getaffinity(0)
    made = OnnxCpuTarget(SHAPE, 1.0, core=min(before))
    assert os.sched_getaffinity(0) == {min(before)}
    os.sched_setaffinity(0, before)     # something else meddles
    made.measure(made.prepare([Workload(graph=reference_graph(3, 16))]))
    assert os.sched_getaffinity(0) == {min(before)}
    made.close()
    made.close()
    assert os.sched_getaffinity(0) == before
    assert gc.isenabled()


def test_bad_options_and_models_are_named(target: OnnxCpuTarget) -> None:
    with pytest.raises(ConfigError, match="threads is 0"):
        OnnxCpuTarget(SHAPE, threads=0)
    with pytest.raises(ConfigError, match="core 4096 cannot be used"):
        make_target("onnx_cpu", {"core": 4096}, SHAPE)
    with pytest.raises(ConfigError, match="has no option 'cores'"):
        make_target("onnx_cpu", {"cores": 1}, SHAPE)
    with pytest.raises(ConfigError, match="not a subclass"):
        make_target("math:sqrt", {}, SHAPE)
    with pytest.raises(TargetError, match="made for batch 3"):
        target.prepare([Workload(onnx=to_onnx(reference_graph(3, 16), batch=3).SerializeToString())])
    with pytest.raises(TargetError, match="cannot load the network"):
        target.prepare([Workload(onnx=b"junk")])


def test_batch_and_free_batch_dimension() -> None:
    made = OnnxCpuTarget(SHAPE, 1.0, batch=4)
    graph = reference_graph(3, 16)
    free = Workload(onnx=to_onnx(graph, batch=None).SerializeToString())
    for handle in made.prepare([Workload(graph=graph), free]):
        assert next(iter(handle.feed.values())).shape == (4, *SHAPE)
    made.close()


def test_files_that_take_uint8_images(target: OnnxCpuTarget) -> None:
    """Timed with images of the size that the file names; without one nothing could be made up."""
    model = to_onnx(reference_graph(3, 16), pixels=Pixels.neutral((20, 30), 3))
    handle, = target.prepare([Workload(onnx=model.SerializeToString())])
    images = handle.feed["images"]
    assert images.dtype == np.uint8 and images.shape == (1, 20, 30, 3) and images.max() > 250
    assert target.measure([handle])[0].latency_ms > 0
    del model.metadata_props[:]
    with pytest.raises(TargetError, match=r"tensor\(uint8\) \[1, 'height', 'width', 3\]; only float and uint8"):
        target.prepare([Workload(onnx=model.SerializeToString())])


def test_networks_behind_their_preprocessing_are_another_target(target: OnnxCpuTarget) -> None:
    made = make_target("onnx_cpu", {}, SHAPE, 2.0, image_size=(20, 30))
    assert made.identity().target_id != target.identity().target_id
    handle, = made.prepare([Workload(graph=reference_graph(3, 16))])
    assert handle.feed["images"].shape == (1, 20, 30, 3)
    assert [output.name for output in handle.session.get_outputs()] == ["probabilities"]
    sample, = made.measure([handle])
    assert sample.target_id == made.identity().target_id and sample.reference_ms == 2.0
    made.close()


def test_resolution_may_be_searched(target: OnnxCpuTarget) -> None:
    """A graph of another size than the target's default is measured at its own size."""
    space = make_space("mobilenetv3-s16", classes=10, channels=1, options={})
    handle = target.prepare([Workload(graph=space.graph(space.extremes()[0]))])[0]
    assert next(iter(handle.feed.values())).shape == (1, *space.graph(space.extremes()[0]).input_shape)


def test_several_threads_need_a_quiet_host(busy_host: None) -> None:
    made = OnnxCpuTarget(SHAPE, 1.0, threads=2)
    with pytest.raises(TargetError, match="other processes use .* measuring with 2 threads takes wall time"):
        made.measure(made.prepare([Workload(graph=reference_graph(3, 16))]))
    made.close()


def test_one_thread_does_not(busy_host: None, target: OnnxCpuTarget) -> None:
    sample = target.measure(target.prepare([Workload(graph=reference_graph(3, 16))]))[0]
    assert sample.load > 0.1 and sample.ratio > 0
