"""The targets by name, and how one is made from the configuration."""
from __future__ import annotations

from collections.abc import Mapping

from actors.targets.android.target import AndroidTarget
from actors.targets.cuda.target import CudaTarget
from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.pixels import PixelTarget
from actors.targets.table import TableTarget
from actors.targets.target import Claim, LatencyTarget
from searchspaces import plugins
from searchspaces.errors import ConfigError
from searchspaces.plugins import user_code

TARGETS: dict[str, type[LatencyTarget]] = {"onnx_cpu": OnnxCpuTarget, "cuda": CudaTarget, "android": AndroidTarget,
                                           "table": TableTarget}
GIVEN = ("input_shape", "reference_ms")     # what the pool passes to every target
INTERNAL = ("reference", "protocol", "modules")     # objects, not configuration


def target_class(name: str) -> type[LatencyTarget]:
    """The class for a name of `TARGETS` or a "module:Class" of the user's."""
    if name in TARGETS:
        return TARGETS[name]
    if ":" not in name:
        raise ConfigError(f"there is no latency target '{name}'; choose one of {', '.join(TARGETS)} or write "
                          "module:Class")
    found = plugins.load_object(name)
    if not (isinstance(found, type) and issubclass(found, LatencyTarget)):
        raise ConfigError(f"'{name}' is not a subclass of actors.targets.target.LatencyTarget")
    return found


def check_options(name: str, options: Mapping[str, object]) -> None:
    """ConfigError where an option is unknown, mistyped or missing; touches no device."""
    plugins.check_options(f"latency target {name}", target_class(name), options, hidden=GIVEN + INTERNAL)


def make_target(name: str, options: Mapping[str, object], input_shape: tuple[int, ...],
                reference_ms: float | None = None, image_size: tuple[int, int] | None = None) -> LatencyTarget:
    """The target, holding its device: call this in the process that measures. With `image_size` (height, width) it
    times networks behind their preprocessing, from such images; not where latencies are looked up."""
    target = _plain_target(name, options, input_shape, reference_ms)
    return target if image_size is None or not target.times_files else PixelTarget(target, image_size)


def _plain_target(name: str, options: Mapping[str, object], input_shape: tuple[int, ...],
                  reference_ms: float | None) -> LatencyTarget:
    check_options(name, options)
    arguments: dict[str, object] = {"input_shape": input_shape, "reference_ms": reference_ms, **options}
    if name in TARGETS:
        return TARGETS[name](**arguments)
    kind = target_class(name)
    with user_code(f"latency target {name}", kind):
        return kind(**arguments)


def announced(name: str, options: Mapping[str, object]) -> dict[str, float]:
    """`LatencyTarget.announced` of the named target."""
    return target_class(name).announced(options)


def claims(name: str, options: Mapping[str, object], offered: Mapping[str, float]) -> list[Claim]:
    """`LatencyTarget.claims` of the named target."""
    return target_class(name).claims(options, offered)
