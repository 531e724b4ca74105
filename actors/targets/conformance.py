"""The conformance suite of latency targets: what every device promises, ours or a user's.

    problems = check_target(MyTarget(input_shape=(3, 32, 32)))      # [] means certified; closes the target

`paretoray check module:Class` prints the same list. Each rule is a function that yields one sentence per violation; a
rule that raises is a violation too. The device must be free; the suite takes a few dozen visits.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple

from actors.targets.reference import graph_hash, reference_graph
from actors.targets.target import LatencySample, LatencyTarget, TargetIdentity, Workload, merge_samples
from searchspaces.errors import TargetError
from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.onnxgraph import to_onnx

VISITS = 4
STANDARD_ERRORS = 3.0
LEAST_TOLERANCE = 0.02      # of the ratio: two visits may differ by more than either knows
PLACEMENT = 0.05            # of the ratio: where in memory a process put its reference network moved it by up to 4 %
ATTEMPTS = 3                # of a rule that compares timings: a busy machine spoils one now and then
Problems = Iterator[str]
Rule = Callable[[LatencyTarget], Problems]


def check_target(target: LatencyTarget) -> list[str]:
    """All violations found, as sentences. The target is closed afterwards."""
    problems: list[str] = []
    timed: tuple[Rule, ...] = (_order, _repeats, _reference_is_one, _files)
    rules: tuple[Rule, ...] = (_identity, _sample, *timed, _survives_a_bad_model, _closes_twice)
    for rule in rules:
        for _ in range(ATTEMPTS if rule in timed else 1):
            found = _broken(rule, target)
            if not found:
                break
        problems += found
    return problems


def _broken(rule: Rule, target: LatencyTarget) -> list[str]:
    try:
        return list(rule(target))
    except Exception as error:  # a user's code may raise anything, and the report must say so
        return [f"{rule.__name__.strip('_').replace('_', ' ')}: raised {type(error).__name__}: {error}"]


def _measure(target: LatencyTarget, *workloads: Workload) -> list[LatencySample]:
    return target.measure(target.prepare(workloads))


def _large(target: LatencyTarget) -> Graph:
    channels, resolution = target.identity().input_shape[:2]
    return reference_graph(channels, resolution)


def _small(target: LatencyTarget) -> Graph:
    """A tenth of the reference network or less."""
    channels, resolution = target.identity().input_shape[:2]
    builder = GraphBuilder(channels, resolution)
    builder.begin_block("only", -1, "only")
    x = builder.activation(builder.conv(INPUT, "conv", 8, 3, 2, bias=True), "act", "relu")
    builder.linear(builder.flatten(builder.global_pool(x, "pool"), "flat"), "linear", 10)
    return builder.build()


def _identity(target: LatencyTarget) -> Problems:
    first, second = target.identity(), target.identity()
    if first != second or first.target_id != second.target_id:
        yield f"identity changes between calls: {first} and {second}"
    if not isinstance(first, TargetIdentity) or not first.kind or not first.device or not first.runtime:
        yield f"identity must name kind, device and runtime, got {astuple(first)}"
    if not target.health().ok:
        yield f"health is not ok before anything ran: {target.health().reason}"
    if not (math.isfinite(target.reference_ms()) and target.reference_ms() > 0):
        yield f"reference_ms must be a positive number of ms, got {target.reference_ms()}"
    if target.reference_ms() != target.reference_ms():
        yield "reference_ms is measured anew on each call; it must be kept, or latencies of one run do not compare"


def _sample(target: LatencyTarget) -> Problems:
    sample = _measure(target, Workload(graph=_large(target)))[0]
    if sample.target_id != target.identity().target_id:
        yield f"a sample says target {sample.target_id}, the identity says {target.identity().target_id}"
    if not math.isclose(sample.latency_ms, sample.ratio * sample.reference_ms, rel_tol=1e-6):
        yield (f"latency_ms {sample.latency_ms} is not ratio * reference_ms = {sample.ratio * sample.reference_ms}")
    if sample.reference_ms != target.reference_ms():
        yield f"a sample's reference_ms is {sample.reference_ms}, the target's {target.reference_ms()}"
    if not sample.rounds == len(sample.candidate_ms) == len(sample.reference_ms_rounds):
        yield (f"a sample counts {sample.rounds} rounds and holds timings of {len(sample.candidate_ms)} of the "
               f"candidate and {len(sample.reference_ms_rounds)} of the reference")
    if not all(timing > 0 for timings in sample.candidate_ms for timing in timings):
        yield "a sample holds timings that are not positive"
    if not (math.isfinite(sample.stderr) and sample.stderr >= 0 and sample.drift >= 0 and 0 <= sample.load <= 1):
        yield f"stderr {sample.stderr}, drift {sample.drift} and load {sample.load} must be >= 0, and load at most 1"


def _order(target: LatencyTarget) -> Problems:
    small, large = Workload(graph=_small(target)), Workload(graph=_large(target))
    handles = target.prepare([small, large, small])
    if len(handles) != 3:
        yield f"prepare returned {len(handles)} handles for 3 workloads"
        return
    samples = target.measure(handles[::-1])
    if len(samples) != 3:
        yield f"measure returned {len(samples)} samples for 3 handles"
    elif not max(samples[0].latency_ms, samples[2].latency_ms) < samples[1].latency_ms:
        yield ("samples are not in the order of the handles, or a network of a tenth of the operations is not faster: "
               f"{[sample.latency_ms for sample in samples]} ms for small, large, small")


def _repeats(target: LatencyTarget) -> Problems:
    """A handle can be measured again, and the same network prepared again gives the same latency."""
    graph = _large(target)
    handles = target.prepare([Workload(graph=graph)])
    first = merge_samples([target.measure(handles)[0] for _ in range(VISITS)])
    second = merge_samples([_measure(target, Workload(graph=graph))[0] for _ in range(VISITS)])
    tolerance = max(LEAST_TOLERANCE * first.ratio, STANDARD_ERRORS * math.hypot(first.stderr, second.stderr))
    if abs(first.ratio - second.ratio) > tolerance:
        yield (f"the same network measured {first.latency_ms:.4g} and {second.latency_ms:.4g} ms, further apart than "
               f"{STANDARD_ERRORS:g} standard errors: the stated errors are too small")


def _reference_is_one(target: LatencyTarget) -> Problems:
    """A candidate equal to the reference; only for targets whose reference is the shipped network."""
    graph = _large(target)
    if target.identity().reference != graph_hash(graph):
        return
    sample = merge_samples([_measure(target, Workload(graph=graph))[0] for _ in range(VISITS)])
    if abs(sample.ratio - 1.0) > max(PLACEMENT, STANDARD_ERRORS * sample.stderr):
        yield (f"the reference network timed as a candidate has ratio {sample.ratio:.3f} +- {sample.stderr:.3f}, not "
               "1: candidate and reference are not timed alike")


def _files(target: LatencyTarget) -> Problems:
    """The bytes of a file and the graph it was written from are the same network."""
    batch = target.identity().batch
    model = Workload(onnx=to_onnx(_large(target), batch=batch).SerializeToString())
    small = Workload(onnx=to_onnx(_small(target), batch=None).SerializeToString())
    from_file = merge_samples([_measure(target, model)[0] for _ in range(VISITS)])
    from_graph = merge_samples([_measure(target, Workload(graph=_large(target)))[0] for _ in range(VISITS)])
    tolerance = max(2 * LEAST_TOLERANCE * from_graph.ratio,
                    STANDARD_ERRORS * math.hypot(from_file.stderr, from_graph.stderr))
    if abs(from_file.ratio - from_graph.ratio) > tolerance:
        yield (f"a file measures {from_file.latency_ms:.4g} ms, the graph it was written from "
               f"{from_graph.latency_ms:.4g} ms")
    if not _measure(target, small)[0].latency_ms < from_file.latency_ms:
        yield "a small file with a free batch dimension is not faster than a large one"


def _survives_a_bad_model(target: LatencyTarget) -> Problems:
    for name, workload in (("bytes that are no ONNX file", Workload(onnx=b"not a model")),
                           ("an empty workload", Workload())):
        try:
            _measure(target, workload)
            yield f"{name} did not raise TargetError"
        except TargetError:
            pass
    if not target.health().ok:
        yield f"the target is not healthy after a bad model: {target.health().reason}"
    if not _measure(target, Workload(graph=_small(target)))[0].latency_ms > 0:
        yield "the target cannot measure after a bad model"


def _closes_twice(target: LatencyTarget) -> Problems:
    target.close()
    target.close()
    yield from ()
