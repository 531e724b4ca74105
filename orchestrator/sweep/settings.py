"""The file of a sweep: a configuration, the keys to vary, and how. docs/sweeps.md explains it."""
from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from orchestrator.config import (
    RUN_NAME,
    Config,
    apply_override,
    assign,
    parse_config,
    parse_options,
    parse_section,
    read_mapping,
)
from orchestrator.settings import SEEDS, Section
from searchspaces.errors import ConfigError

MOST = 1000         # searches of one sweep
Values = Mapping[str, Any]      # one value for each varied key


class Variation(Section):
    """What one key takes: the values of a list, or one of a range. Exactly one of these is given."""

    choice: list[Any] | None = Field(None, min_length=1, max_length=MOST, description="these; a plain list is short "
                                                                                      "for it")
    uniform: tuple[float, float] | None = Field(None, description="a number between these")
    log_uniform: tuple[float, float] | None = Field(None, description="the same, its logarithm being uniform")
    integers: tuple[int, int] | None = Field(None, description="a whole number from the first to the last")

    @model_validator(mode="after")
    def _one(self) -> Variation:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given; write a list of values, or one of uniform, "
                             "log_uniform, integers with its two ends")
        (name, value), = given.items()
        if name == "choice":
            if any(value.count(item) > 1 for item in value):
                raise ValueError(f"a value is listed twice in {value}; list each once")
        elif value[0] >= value[1] or (name == "log_uniform" and value[0] <= 0):
            raise ValueError(f"{name} is [{value[0]:g}, {value[1]:g}]; its first end is the smaller one"
                             + (" and above 0" if name == "log_uniform" else ""))
        return self

    def draw(self, generator: random.Random) -> Any:
        if self.choice is not None:
            return generator.choice(self.choice)
        if self.integers is not None:
            return generator.randint(*self.integers)
        if self.uniform is not None:
            return generator.uniform(*self.uniform)
        low, high = map(math.log, self.log_uniform or ())
        return math.exp(generator.uniform(low, high))

    @property
    def extremes(self) -> list[Any]:
        """All of a list; both ends of a range: where these are allowed, what lies between is."""
        return list(self.choice or self.integers or self.uniform or self.log_uniform or ())


class StopEarly(Section):
    """Asynchronous successive halving: at `after` evaluations, and `factor` times as many, and so on, a search whose
    hypervolume is not among the best 1/`factor` of those that came as far is stopped."""

    after: int = Field(20, ge=1, le=10_000_000, description="evaluations before any search is stopped")
    factor: float = Field(3.0, gt=1, le=100, description="one in so many goes on to so many times the evaluations")


def _listed(value: Any) -> Any:
    return {"choice": value} if isinstance(value, list) else value


class SweepSettings(Section):
    """A whole sweep. See configs/sweep.yaml for an annotated example."""

    name: str | None = Field(None, description="name of the sweep; default: the file's name and the time")
    base: dict[str, Any] = Field(description="configuration that all searches share: the path of a file, or sections")
    over: dict[str, Annotated[Variation, BeforeValidator(_listed)]] = Field(min_length=1, description=(
        "keys to vary, such as search.evaluations, each with a list of values, or in a range"))
    search: Literal["grid", "random", "optuna"] = Field("grid", description=(
        "grid: every combination of lists; random; optuna: what did well decides what is tried (extra `optuna`)"))
    samples: int | None = Field(None, ge=1, le=MOST, description="searches of a random or an optuna sweep")
    seed: int = Field(0, ge=0, le=SEEDS, description="of what is drawn; the searches have their own")
    parallel: int = Field(1, ge=1, le=MOST, description="searches at a time, fewer where they would not find room")
    stop_early: StopEarly | None = Field(None, description="stop searches that are behind the others")
    reference_ms: float | None = Field(None, gt=0, le=3_600_000, description=(
        "latency that bounds every hypervolume; none: the slowest network that the first search measures"))

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str | None) -> str | None:
        if name is not None and (not RUN_NAME.fullmatch(name) or ".." in name):
            raise ValueError("a sweep's name is up to 100 letters, digits, '-', '_' and single '.', and starts with a "
                             "letter or digit")
        return name

    @model_validator(mode="after")
    def _countable(self) -> SweepSettings:
        ranges = [key for key, variation in self.over.items() if variation.choice is None]
        if self.search != "grid":
            if self.samples is None:
                raise ValueError(f"search: {self.search} needs the number of searches; give samples")
        elif ranges:
            raise ValueError(f"search: grid tries every combination of lists, and '{ranges[0]}' is a range; list its "
                             "values, or choose search: random")
        elif self.samples is not None:
            raise ValueError(f"search: grid has {self._combinations} combinations and takes no samples; leave samples "
                             "out, or choose search: random")
        elif self.count > MOST:
            raise ValueError(f"over has {self.count} combinations, at most {MOST} are allowed; choose search: random")
        return self

    @property
    def count(self) -> int:
        """Of searches."""
        return self.samples or self._combinations

    @property
    def _combinations(self) -> int:
        return math.prod(len(variation.choice or ()) for variation in self.over.values())

    def points(self) -> list[dict[str, Any]]:
        """The values of all searches, in order; [] where they are known only one by one."""
        if self.search == "grid":
            lists = [variation.choice or [] for variation in self.over.values()]
            return [dict(zip(self.over, values)) for values in itertools.product(*lists)]
        generator = random.Random(self.seed)
        return [{key: variation.draw(generator) for key, variation in self.over.items()}
                for _ in range(self.samples or 0)] if self.search == "random" else []

    def probes(self) -> list[dict[str, Any]]:
        """Values that a search might have, which together hold every extreme; to check before anything starts."""
        first = {key: variation.extremes[0] for key, variation in self.over.items()}
        last = {key: variation.extremes[-1] for key, variation in self.over.items()}
        each = [first | {key: value} for key, variation in self.over.items() for value in variation.extremes[1:]]
        return self.points() or [first, *each, last]

    def config(self, values: Values) -> Config:
        """Of one search. ConfigError where the values do not fit together."""
        raw = copy.deepcopy(self.base)
        for key, value in values.items():
            assign(raw, key, copy.deepcopy(value), f"over.{key}")
        return parse_config(raw, "the sweep, with " + ", ".join(f"{key}={value}" for key, value in values.items()))


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepSettings:
    """Reads a sweep's YAML file and applies `key=value` overrides: `base.KEY` sets a key of the base configuration,
    `over.KEY` says what a key takes, dots and all."""
    raw = read_mapping(path)
    if isinstance(raw.get("base"), str):
        raw["base"] = read_mapping(raw["base"])
    for override in overrides:
        section, _, rest = override.partition(".")
        if section not in ("base", "over"):
            apply_override(raw, override)
        elif not isinstance(raw.get(section), dict):
            raise ConfigError(f"--set {override}: {path} has no section '{section}'")
        elif section == "base":
            apply_override(raw["base"], rest)
        else:
            key, _, value = rest.partition("=")
            raw["over"][key] = parse_options([f"value={value}"])["value"]
    if isinstance(raw.get("base"), str):
        raw["base"] = read_mapping(raw["base"])
    return parse_sweep(raw, str(path))


def parse_sweep(raw: dict[str, Any], source: str) -> SweepSettings:
    """ConfigError for what is not allowed, in the sweep or in any configuration that it leads to."""
    settings = parse_section(SweepSettings, raw, source)
    if settings.search == "optuna":
        check_optuna()
    for values in settings.probes():
        settings.config(values)
    return settings


def check_optuna() -> None:
    try:
        import optuna  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError("search: optuna needs the package optuna; install it with: pip install 'paretoray[optuna]', "
                          "or choose search: random") from error
