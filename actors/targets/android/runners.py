"""The programs that time networks on a phone: our runner, and those that people already have.

    adapter                model file   a timing is                     paired on the device
    paretoray              ONNX         every single run                yes, in rounds
    onnxruntime_perf_test  ONNX         the median of its runs          no: reference, candidate, reference, ...
    benchmark_model        TFLite       the average of its runs         no, as above
    benchncnn              ncnn param   the least of its runs           no, as above

A `command` is one shell text for a whole batch; every part that comes from outside is quoted. `read` turns what it
printed into an outcome per model: timings, or one sentence why there are none. `UnfinishedError` means that the output
as a whole does not count: a batch counts with exit code 0, its last line, and one result per model.
"""
from __future__ import annotations

import json
import math
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.targets.android.device import LinkError
from actors.targets.pairing import Rounds
from searchspaces.errors import ConfigError

EXCERPT = 120


class UnfinishedError(LinkError):
    """A batch without its end: the link, the runner or the phone ended early."""


@dataclass(frozen=True)
class Plan:
    """`rounds` of `runs` each. `prefix`: environment and taskset. `big`: only the fastest cores are meant."""

    runner: str
    reference: str
    prefix: tuple[str, ...]
    warm_up: int
    rounds: int
    runs: int
    threads: int
    batch: int
    input_shape: tuple[int, ...]
    big: bool


@dataclass(frozen=True)
class Timings:
    """`reference_ms[i]` was timed beside `candidate_ms[i]`. `single`: each number is one run, and the first of a round
    are cold; otherwise it is `details["statistic"]` of many. `runtime` is "" where the program does not say."""

    candidate_ms: Rounds
    reference_ms: Rounds
    single: bool
    runtime: str = ""
    details: dict[str, Any] = field(default_factory=dict)


Outcome = Timings | str


class Runner(ABC):
    """Stateless. `converts`: it reads another format, so a converter from ONNX is needed; `suffix` of its files."""

    name: str
    suffix: str
    precision = "float32"
    converts = False
    most_batch: int | None = None

    @abstractmethod
    def command(self, plan: Plan, models: Sequence[str]) -> str:
        """A shell text whose exit code is 0 where the batch ran to its end."""

    @abstractmethod
    def read(self, output: str, models: Sequence[str], plan: Plan) -> list[Outcome]:
        """In the order of the models."""


class ParetorayRunner(Runner):
    """The contract of `pyrunner.py` and of the C++ runner."""

    name, suffix = "paretoray", "onnx"

    def command(self, plan: Plan, models: Sequence[str]) -> str:
        return shlex.join([*plan.prefix, plan.runner, "--ref", plan.reference, "--warmup", str(plan.warm_up),
                           "--rounds", str(plan.rounds), "--runs", str(plan.runs), "--threads", str(plan.threads),
                           "--batch", str(plan.batch), *models])

    def read(self, output: str, models: Sequence[str], plan: Plan) -> list[Outcome]:
        lines = [line for line in output.splitlines() if line.strip()]
        answers = [_object(line) for line in lines]
        if not answers or answers[-1] != {"done": len(models)}:
            raise UnfinishedError(f"the runner's output does not end with {{\"done\": {len(models)}}} but with "
                             f"{_excerpt(lines[-1] if lines else '')}")
        found = {str(answer["model"]): answer for answer in answers[:-1] if answer is not None and "model" in answer}
        missing = [model for model in models if model not in found]
        if missing:
            raise UnfinishedError(f"the runner printed no line for {missing[0]}")
        return [self._outcome(found[model], plan) for model in models]

    def _outcome(self, answer: dict[str, Any], plan: Plan) -> Outcome:
        if "error" in answer:
            return _sentence(answer["error"])
        rounds = [_rounds(answer.get(key), plan) for key in ("candidate_ms", "reference_ms")]
        if rounds[0] is None or rounds[1] is None or not isinstance(answer.get("runtime"), str):
            raise UnfinishedError(f"the runner's line for {answer['model']} lacks {plan.rounds} rounds of {plan.runs} "
                             "positive timings, or its runtime")
        details = {key: answer.get(key) for key in ("clock", "affinity", "temperature_c")}
        return Timings(rounds[0], rounds[1], True, answer["runtime"], {**details, "statistic": "25th percentile"})


class PublicRunner(Runner):
    """One process per network: the reference runs before, between and after `rounds` runs of each candidate."""

    statistic: str
    rounds = 3

    @abstractmethod
    def once(self, plan: Plan, model: str) -> list[str]:
        """The words that time one network."""

    @abstractmethod
    def milliseconds(self, output: str) -> float | None:
        """The statistic, from what the program printed; None where it is not there."""

    def command(self, plan: Plan, models: Sequence[str]) -> str:
        lines = []
        for model in models:
            for path in [plan.reference, *[model, plan.reference] * self.rounds]:
                lines.append(f"echo {shlex.quote(f'@@ {path}')}; "
                             f"{shlex.join([*plan.prefix, *self.once(plan, path)])} 2>&1; echo \"@= $?\"")
        return "\n".join([*lines, f"echo '@@ done {len(models)}'"])

    def read(self, output: str, models: Sequence[str], plan: Plan) -> list[Outcome]:
        parts = re.split(r"^@@ (.*)$", output, flags=re.MULTILINE)[1:]
        paths, texts = parts[::2], parts[1::2]
        each = 2 * self.rounds + 1
        if not paths or paths[-1].strip() != f"done {len(models)}" or len(paths) != each * len(models) + 1:
            raise UnfinishedError(f"{self.name} printed {_excerpt(output)} and not the end of {len(models)} models")
        return [self._outcome(model, [self._timing(text) for text in texts[index * each:(index + 1) * each]])
                for index, model in enumerate(models)]

    def _outcome(self, model: str, timings: list[float | str]) -> Outcome:
        for path, timing in zip(["the reference network", model] * len(timings), timings):
            if isinstance(timing, str):
                return f"{self.name} cannot run {path}: {timing}"
        numbers = [timing for timing in timings if isinstance(timing, float)]
        reference = tuple(((before + after) / 2.0,) for before, after in zip(numbers[::2], numbers[2::2]))
        details = {"statistic": self.statistic, "reference_before_after_ms": numbers[::2]}
        return Timings(tuple((timing,) for timing in numbers[1::2]), reference, False, "", details)

    def _timing(self, text: str) -> float | str:
        body, _, code = text.rpartition("@= ")
        if code.strip() != "0":
            return f"{_excerpt(body)} (exit code {code.strip() or 'unknown'})"
        value = self.milliseconds(body)
        return value if value is not None and math.isfinite(value) and value > 0 else \
            f"it printed no {self.statistic} but {_excerpt(body)}"


class OnnxruntimePerfTest(PublicRunner):
    """`onnxruntime_perf_test`; old versions print "P50 Latency is 0.0587sec", new ones "P50 Latency: 0.0587 s"."""

    name, suffix, statistic = "onnxruntime_perf_test", "onnx", "median"

    def once(self, plan: Plan, model: str) -> list[str]:
        return [plan.runner, "-e", "cpu", "-m", "times", "-r", str(2 * plan.runs), "-x", str(plan.threads),
                "-y", "1", "-o", "99", "-s", "-I", model]

    def milliseconds(self, output: str) -> float | None:
        return _number(r"P50 Latency(?: is|:)\s*([\d.eE+-]+)\s*s", output, 1e3)


class BenchmarkModel(PublicRunner):
    """TensorFlow Lite's `benchmark_model`, whose last word is "Inference (avg): MICROSECONDS"."""

    name, suffix, statistic, converts = "benchmark_model", "tflite", "average", True

    def once(self, plan: Plan, model: str) -> list[str]:
        return [plan.runner, f"--graph={model}", f"--num_threads={plan.threads}",
                f"--num_runs={2 * plan.runs}", f"--warmup_runs={plan.warm_up}", "--min_secs=0",
                "--warmup_min_secs=0"]

    def milliseconds(self, output: str) -> float | None:
        return _number(r"(?:Inference \(avg\)|no stats): ([\d.eE+-]+)", output, 1e-3)


class Benchncnn(PublicRunner):
    """ncnn's `benchncnn` with a param file and random weights. It sets its own affinity: 2 means big cores."""

    name, suffix, statistic, converts, most_batch = "benchncnn", "param", "minimum", True, 1
    precision = "float16 where the processor has it"

    def once(self, plan: Plan, model: str) -> list[str]:
        channels, height, width = plan.input_shape
        return [plan.runner, str(2 * plan.runs), str(plan.threads), "2" if plan.big else "0", "-1", "0",
                f"param={model}", f"shape=[{width},{height},{channels}]"]

    def milliseconds(self, output: str) -> float | None:
        return _number(r"min =\s*([\d.]+)\s+max =\s*[\d.]+\s+avg =", output, 1.0)


RUNNERS: dict[str, type[Runner]] = {runner.name: runner for runner in
                                    (ParetorayRunner, BenchmarkModel, OnnxruntimePerfTest, Benchncnn)}


def make_runner(name: str, batch: int, converter: str | None) -> Runner:
    """ConfigError where the adapter cannot measure this batch or lacks a converter."""
    runner = RUNNERS[name]()
    if runner.most_batch is not None and batch > runner.most_batch:
        raise ConfigError(f"target android: {name} measures batch {runner.most_batch} only and batch is {batch}")
    if runner.converts and converter is None:
        raise ConfigError(f"target android: {name} reads .{runner.suffix} files; name a function from the bytes of an "
                          "ONNX file to those of such a file in the option converter, as module:function")
    return runner


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _rounds(value: Any, plan: Plan) -> Rounds | None:
    """Checked: as many rounds and runs as asked for, all positive and finite."""
    if not isinstance(value, list) or len(value) != plan.rounds:
        return None
    if not all(isinstance(timings, list) and len(timings) == plan.runs for timings in value):
        return None
    if not all(type(ms) in (int, float) and math.isfinite(ms) and ms > 0 for timings in value for ms in timings):
        return None
    return tuple(tuple(float(ms) for ms in timings) for timings in value)


def _number(pattern: str, output: str, factor: float) -> float | None:
    found = re.findall(pattern, output)
    try:
        return float(found[-1]) * factor if found else None
    except ValueError:
        return None


def _sentence(error: object) -> str:
    return (str(error).strip().splitlines() or ["the runner gave no reason"])[0]


def _excerpt(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= EXCERPT else f"...{words[-EXCERPT:]}") if words else "nothing"
