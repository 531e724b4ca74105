"""How good and how dear latency measurements on this GPU are. Exit status 2 where there is none.

    python -m tests.benchmarks.cuda                                 # batches 1 and 32, and batch 1 with CUDA graphs
    python -m tests.benchmarks.cuda --batches 32 --networks 10 --visits 4

repeatability   as tests/benchmarks/latency.py: CV and Kendall's tau between visits; "unpaired" is the plain median
cost            milliseconds for graph and file, session with warm-up, visit
agreement       the target's latency over that of a loop of 200 runs between two CUDA events, written here anew: with
                ONNX Runtime (mean and spread of the ratio, tau), and with torch (tau only, because its kernels differ)
"""
from __future__ import annotations

import argparse
import shlex
import sys
import time

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from actors.targets.cuda.target import CudaTarget
from actors.targets.target import Workload
from orchestrator.run.stages.measure import spread_sample
from searchspaces.catalogue import make_space
from searchspaces.errors import ParetorayError
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import SearchSpace, Tokens
from tests.benchmarks.latency import report, spread, visit_all

RUNS, WARM_UP = 200, 50


def repeatability(target: CudaTarget, space: SearchSpace, rows: Tokens, visits: int) -> NDArray[np.float64]:
    """Latency in ms of each network, the mean over visits."""
    samples = visit_all(target, space, rows, visits)
    ratios = np.array([[sample.ratio for sample in visit] for visit in samples])
    plain = np.array([[np.median(np.concatenate(sample.candidate_ms)) for sample in visit] for visit in samples])
    for name, values in (("one visit", ratios), ("unpaired", plain)):
        cv, tau = spread(values)
        report(f"repeatability, {name}", "", f"CV {cv:.2f} %, tau {tau:.3f}")
    seen = [sample.details for visit in samples for sample in visit if "gpu_after" in sample.details]
    if seen:
        clocks = [details["gpu_after"]["sm_mhz"] for details in seen]
        reasons = sorted({reason for details in seen for reason in details["gpu_after"]["reasons"] or ()})
        report("clocks meanwhile", "", f"{min(clocks)}-{max(clocks)} MHz, {', '.join(reasons) or 'never slowed down'}")
    return ratios.mean(axis=0) * target.reference_ms()


def cost(target: CudaTarget, space: SearchSpace, rows: Tokens) -> None:
    graph_ms, session_ms, visit_ms = [], [], []
    for row in rows:
        start = time.perf_counter()
        content = to_onnx(space.graph(row), batch=target.identity().batch).SerializeToString()
        middle = time.perf_counter()
        handle = target.prepare([Workload(onnx=content)])
        session_ms.append(1e3 * (time.perf_counter() - middle))
        graph_ms.append(1e3 * (middle - start))
        visit_ms.append(1e3 * target.measure(handle)[0].duration_s)
    for name, values in (("graph and file", graph_ms), ("session and warm-up", session_ms), ("visit", visit_ms)):
        report(f"cost per architecture, {name}", "", f"{np.median(values):.1f} ms median, {max(values):.1f} most")


def agreement(target: CudaTarget, space: SearchSpace, rows: Tokens, measured_ms: NDArray[np.float64]) -> None:
    identity = target.identity()
    graphs = "cuda_graph" in identity.runtime
    plain_ms = np.array([ort_loop_ms(space, row, identity.batch, graphs) for row in rows])
    ratio = measured_ms / plain_ms
    report("agreement with a plain loop in ONNX Runtime", "1",
           f"{ratio.mean():.3f} +- {ratio.std(ddof=1):.3f}, tau {kendalltau(measured_ms, plain_ms).statistic:.3f}")
    torch_ms = np.array([torch_loop_ms(space, row, identity.batch) for row in rows])
    report("rank agreement with a plain loop in torch", "", f"tau {kendalltau(measured_ms, torch_ms).statistic:.3f}")


def ort_loop_ms(space: SearchSpace, row: Tokens, batch: int, graphs: bool) -> float:
    model = to_onnx(space.graph(row), batch=batch).SerializeToString()
    stream = torch.cuda.Stream()
    options = {"user_compute_stream": str(stream.cuda_stream), "use_tf32": "0", "enable_cuda_graph": str(int(graphs))}
    session = onnxruntime.InferenceSession(model, providers=[("CUDAExecutionProvider", options)])
    images = np.random.default_rng(1).random((batch, *space.graph(row).input_shape), dtype=np.float32)
    source = onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0)
    sink = onnxruntime.OrtValue.ortvalue_from_shape_and_type(session.get_outputs()[0].shape, np.float32, "cuda", 0)
    binding, run = session.io_binding(), onnxruntime.RunOptions()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, source)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, sink)
    run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return event_loop_ms(lambda: session.run_with_iobinding(binding, run), stream)


def torch_loop_ms(space: SearchSpace, row: Tokens, batch: int) -> float:
    network = GraphNetwork(space.graph(row)).cuda().eval()
    images = torch.rand(batch, *space.graph(row).input_shape, device="cuda")
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        return event_loop_ms(lambda: network(images), stream)


def event_loop_ms(run: object, stream: torch.cuda.Stream) -> float:
    assert callable(run)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    start.record(stream)
    for _ in range(RUNS):
        run()
    end.record(stream)
    torch.cuda.synchronize()
    return start.elapsed_time(end) / RUNS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobilenetv3-s32")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--visits", type=int, default=6, help="per network")
    arguments = parser.parse_args()
    space = make_space(arguments.space, classes=10, channels=3, options={})
    shape = space.graph(space.extremes()[1]).input_shape
    rows = spread_sample(space, arguments.networks, 1)
    print(shlex.join(["python", "-m", "tests.benchmarks.cuda", *sys.argv[1:]]))
    conditions = [(batch, False) for batch in arguments.batches] + [(min(arguments.batches), True)]
    for batch, graphs in conditions:
        try:
            target = CudaTarget(shape, batch=batch, cuda_graph=graphs)
        except ParetorayError as error:
            print(f"nothing is measured: {error}")
            raise SystemExit(2) from error
        print(f"\n{space.space_id}, batch {batch}, on {target.identity().device}, {target.identity().runtime}, "
              f"reference {target.reference_ms():.3g} ms")
        measured_ms = repeatability(target, space, rows, arguments.visits)
        cost(target, space, rows)
        agreement(target, space, rows, measured_ms)
        target.close()


if __name__ == "__main__":
    main()
