"""The C++ runner, built here and run on real networks: its contract line by line. Of times only ratios are judged."""
from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from actors.targets.android.files import with_sizes
from actors.targets.pairing import paired_ratios
from searchspaces.catalogue import make_space
from searchspaces.onnxgraph import to_onnx
from searchspaces.onnxpixels import Pixels
from tests.actors.targets import runner_build

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the runner is for Linux and Android")
TIMEOUT_S = 120.0
DROP = 3        # runs of a round before the caches are warm
LEAST = ["--warmup", "0", "--rounds", "1", "--runs", "1", "--threads", "1"]
Line = dict[str, Any]


@pytest.fixture(scope="session")
def zones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What /sys/class/thermal looks like, with a zone in whole degrees, two of one name, and two without a reading."""
    folder = tmp_path_factory.mktemp("thermal")
    for zone, name, temp in (("thermal_zone0", "battery", "31500"), ("thermal_zone1", "skin", "42"),
                             ("thermal_zone2", 'cpu "big"', "-1250"), ("thermal_zone3", "battery", "30000"),
                             ("thermal_zone4", "silent", None), ("thermal_zone5", "odd", "none"),
                             ("cooling_device0", "fan", None)):
        (folder / zone).mkdir()
        (folder / zone / "type").write_text(f"{name}\n")
        if temp is not None:
            (folder / zone / "temp").write_text(f"{temp}\n")
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory, zones: Path) -> Path:
    try:
        return runner_build.compile_runner(tmp_path_factory.mktemp("runner"), [f'PARETORAY_THERMAL_DIR="{zones}"'])
    except runner_build.CannotBuildError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def runner(compiled: Path) -> Path:
    try:
        return runner_build.link_runner(compiled.parent, compiled, runner_build.library())
    except runner_build.CannotBuildError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.onnx and large.onnx of one space, free.onnx the small one with a free batch, and some that cannot run."""
    folder = tmp_path_factory.mktemp("networks")
    space = make_space("mobilenetv3-s32", classes=10, channels=3, options={})
    smallest, largest = space.extremes()
    onnx.save(to_onnx(space.graph(smallest)), folder / "small.onnx")
    onnx.save(to_onnx(space.graph(largest)), folder / "large.onnx")
    onnx.save(to_onnx(space.graph(smallest), batch=None), folder / "free.onnx")
    pixels = to_onnx(space.graph(smallest), pixels=Pixels.neutral((20, 30), 3))
    (folder / "pixels.onnx").write_bytes(with_sizes(pixels.SerializeToString(), 1))
    onnx.save(identity(TensorProto.FLOAT, ["batch", "side"]), folder / "free_side.onnx")
    onnx.save(identity(TensorProto.INT64, [1, 4]), folder / "integers.onnx")
    onnx.save(identity(TensorProto.FLOAT, [1 << 20, 1 << 20]), folder / "huge.onnx")
    (folder / "junk.onnx").write_bytes(b"not a network")
    return folder


def identity(kind: int, shape: list[int | str]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(program: Path, folder: Path, *arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)


def measured(program: Path, folder: Path, *arguments: str | bytes) -> list[Line]:
    """The lines of a run that has to end well, without the sentinel, which has to be true."""
    done = run(program, folder, *arguments)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert last == {"done": len(lines)}
    return lines


def ratio(line: Line) -> float:
    rounds = [[timings[DROP:] for timings in line[key]] for key in ("reference_ms", "candidate_ms")]
    return float(np.median(paired_ratios(*rounds)))


def test_a_line_holds_what_the_contract_says(runner: Path, networks: Path) -> None:
    line, = measured(runner, networks, "--ref", "large.onnx", "--warmup", "1", "--rounds", "3", "--runs", "5",
                     "--threads", "1", "small.onnx")
    timings = np.array([line.pop("candidate_ms"), line.pop("reference_ms")])
    assert timings.shape == (2, 3, 5)
    assert np.all(timings > 0)
    assert line == {
        "model": "small.onnx", "clock": "thread_cpu", "affinity": sorted(os.sched_getaffinity(0)),
        "temperature_c": {"battery": 31.5, "skin": 42.0, 'cpu "big"': -1.25, "battery thermal_zone3": 30.0},
        "runtime": f"onnxruntime {onnxruntime.__version__}"}


def test_bytes_are_made_up_too(runner: Path, networks: Path) -> None:
    line, = measured(runner, networks, "--ref", "small.onnx", *LEAST, "pixels.onnx")
    assert np.array(line["candidate_ms"]).shape == (1, 1), line


def test_affinity_is_what_the_caller_pinned_it_to(runner: Path, networks: Path) -> None:
    if shutil.which("taskset") is None:
        pytest.skip("no taskset")
    core = max(os.sched_getaffinity(0))
    command = ["taskset", f"{1 << core:x}", runner, "--ref", "small.onnx", *LEAST, "small.onnx"]
    done = subprocess.run(command, cwd=networks, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert json.loads(done.stdout.splitlines()[0])["affinity"] == [core]


def test_ratios_rank_networks(runner: Path, networks: Path) -> None:
    same, smaller = measured(runner, networks, "--ref", "large.onnx", "--warmup", "3", "--rounds", "7", "--runs", "8",
                             "--threads", "1", "large.onnx", "small.onnx")
    assert [same["model"], smaller["model"]] == ["large.onnx", "small.onnx"]
    assert ratio(same) == pytest.approx(1.0, abs=0.15)
    assert ratio(smaller) < 0.7


def test_a_free_batch_is_the_one_asked_for(runner: Path, networks: Path) -> None:
    common = ["--ref", "small.onnx", "--warmup", "2", "--rounds", "5", "--runs", "8", "--threads", "1"]
    one, = measured(runner, networks, *common, "free.onnx")
    eight, = measured(runner, networks, *common, "--batch", "8", "free.onnx")
    assert ratio(one) == pytest.approx(1.0, abs=0.3)
    assert ratio(eight) > 2.0


def test_sessions_optimise_all_they_can(runner: Path, networks: Path) -> None:
    """Beside the same network optimised beforehand: without this processor's layouts it would be 3 times slower."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(networks / "optimised.onnx")
    options.log_severity_level = 4      # it warns that the file is for this processor only
    onnxruntime.InferenceSession(networks / "small.onnx", options, providers=["CPUExecutionProvider"])
    line, = measured(runner, networks, "--ref", "optimised.onnx", "--warmup", "3", "--rounds", "5", "--runs", "8",
                     "--threads", "1", "small.onnx")
    assert ratio(line) == pytest.approx(1.0, abs=0.3)


def test_several_threads_take_wall_time(runner: Path, networks: Path) -> None:
    line, = measured(runner, networks, "--ref", "small.onnx", "--warmup", "1", "--rounds", "2", "--runs", "3",
                     "--threads", "2", "large.onnx")
    assert line["clock"] == "wall"
    assert np.array(line["candidate_ms"]).shape == (2, 3)


def test_what_cannot_run_is_an_error_line_and_the_rest_goes_on(runner: Path, networks: Path) -> None:
    bad = {"junk.onnx": "cannot be loaded: .*Protobuf parsing failed", "absent.onnx": "doesn't exist",
           "free_side.onnx": "input x has a free or empty dimension", "integers.onnx": "x is no float or uint8 tensor",
           "huge.onnx": "input x is larger than 4 GiB"}
    lines = measured(runner, networks, "--ref", "small.onnx", *LEAST, *bad, "small.onnx")
    assert [line["model"] for line in lines] == [*bad, "small.onnx"]
    for line, reason in zip(lines, bad.values()):
        assert set(line) == {"model", "error"}
        with pytest.raises(ValueError, match=reason):
            raise ValueError(line["error"])
    assert len(lines[-1]["candidate_ms"]) == 1


def test_a_reference_that_cannot_run_is_every_models_error(runner: Path, networks: Path) -> None:
    lines = measured(runner, networks, "--ref", "junk.onnx", *LEAST, "small.onnx", "large.onnx")
    assert [line["model"] for line in lines] == ["small.onnx", "large.onnx"]
    assert all(line["error"].startswith("the reference network cannot be loaded: ") for line in lines)


@pytest.mark.parametrize("name", ['quo"te\\.onnx', "tab\tnewline\n.onnx", "größe-模型-😀.onnx", "one\x01\x1f.onnx",
                                  b"\xff\xc3(\xe2\x82.onnx", b"\xc0\xafoverlong\xed\xa0\x80\xf4\x90\x80\x80.onnx"])
def test_paths_survive_json(runner: Path, networks: Path, name: str | bytes) -> None:
    line, = measured(runner, networks, "--ref", "small.onnx", *LEAST, name)
    assert os.fsencode(line["model"]) == os.fsencode(name)
    assert "error" in line


@pytest.mark.parametrize(("arguments", "reason"), [
    ([], "--ref is missing"),
    (["--ref", "small.onnx", *LEAST], "no model is given"),
    ([*LEAST, "small.onnx"], "--ref is missing"),
    (["--ref", "small.onnx", *LEAST[2:], "small.onnx"], "--warmup is missing"),
    (["--ref", "small.onnx", *LEAST, "small.onnx", "--runs"], "--runs needs a value"),
    (["--ref", "small.onnx", *LEAST, "--runs", "0", "small.onnx"], '--runs is "0", it must be a whole number from 1'),
    (["--ref", "small.onnx", *LEAST, "--warmup", "-1", "small.onnx"], '--warmup is "-1"'),
    (["--ref", "small.onnx", *LEAST, "--threads", "2x", "small.onnx"], '--threads is "2x"'),
    (["--ref", "small.onnx", *LEAST, "--batch", "99999999999", "small.onnx"], '--batch is "99999999999"'),
    (["--ref", "small.onnx", *LEAST, "--round", "3", "small.onnx"], 'the option "--round" is unknown'),
])
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(runner: Path, networks: Path, arguments: list[str],
                                                              reason: str) -> None:
    done = run(runner, networks, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help(runner: Path, networks: Path) -> None:
    done = run(runner, networks, "--threads", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--ref", "--warmup", "--rounds", "--runs", "--threads", "--batch"):
        assert flag in done.stdout


def test_every_line_is_out_before_the_next_network_starts(runner: Path, networks: Path, tmp_path: Path) -> None:
    """The second network is a pipe that nobody writes to, so that loading it waits."""
    pipe = tmp_path / "waits.onnx"
    os.mkfifo(pipe)
    with subprocess.Popen([runner, "--ref", "small.onnx", *LEAST, "large.onnx", pipe], cwd=networks,
                          stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], TIMEOUT_S / 4)[0], "nothing came"
            assert json.loads(os.read(process.stdout.fileno(), 1 << 16))["model"] == "large.onnx"
            assert process.poll() is None
        finally:
            process.kill()


def test_a_library_older_than_the_headers_is_every_models_error(compiled: Path, networks: Path, tmp_path: Path) -> None:
    source = tmp_path / "old.cc"
    source.write_text('#include <onnxruntime_c_api.h>\n'
                      'const OrtApi* none(uint32_t) noexcept { return nullptr; }\n'
                      'const char* version() noexcept { return "1.2.3"; }\n'
                      'const OrtApiBase base = {none, version};\n'
                      'extern "C" const OrtApiBase* OrtGetApiBase() noexcept { return &base; }\n')
    old = tmp_path / runner_build.SONAME
    command = [runner_build.compiler(), "-shared", "-fPIC", "-isystem", str(runner_build.header_folder()), str(source),
               f"-Wl,-soname,{old.name}", "-o", str(old)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    program = runner_build.link_runner(tmp_path, compiled, old)
    lines = measured(program, networks, "--ref", "small.onnx", *LEAST, "small.onnx", "large.onnx")
    assert [line["model"] for line in lines] == ["small.onnx", "large.onnx"]
    assert all("onnxruntime 1.2.3 is older than the headers" in line["error"] for line in lines)


def test_cmake_builds_it_with_its_library_beside_it(runner: Path, networks: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    configure = ["cmake", "-S", str(runner_build.SOURCE), "-B", str(tmp_path),
                 f"-DORT_INCLUDE_DIR={runner_build.header_folder()}"]
    refused = subprocess.run(configure, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert refused.returncode != 0
    assert 'ORT_LIBRARY is "", it must be the file' in refused.stderr
    for command in ([*configure, f"-DORT_LIBRARY={runner_build.library()}"], ["cmake", "--build", str(tmp_path)]):
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    line, = measured(tmp_path / "paretoray_runner", networks, "--ref", "small.onnx", *LEAST, "small.onnx")
    assert line["runtime"] == f"onnxruntime {onnxruntime.__version__}"
