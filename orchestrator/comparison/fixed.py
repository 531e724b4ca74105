"""`compare: [fixed]`: the network of `supernet.start` as a user would use it without a search.

It stays as published, at one resolution, and is fine-tuned from the same weights on as many images as the run trains
on: passes of the supernet plus those of a hand-over, with the supernet's learning rate, batches and augmentation.
Every multiple of 16 pixels may be its resolution, beside those of the space's token.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.data import Preprocessing, Splits
from actors.objectpath import AnyPath
from actors.supernet.finetune import arrays
from actors.supernet.tuning import TuningSettings, tuned_weights
from orchestrator.config import Config
from orchestrator.handover.architectures import look_ups
from orchestrator.handover.exported import file_accuracy
from orchestrator.services.pretrained import started
from orchestrator.services.recipes import supernet_settings
from searchspaces.catalogue import ELITE, make_space
from searchspaces.errors import ConfigError
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import SearchSpace, Tokens

STEP = 16       # pixels between two resolutions that a user would try
TOKEN = "resolution"


def check_comparison(config: Config) -> None:
    """ConfigError where there is no fixed network to compare with, or no file of it could be timed."""
    if not config.compare:
        return
    if config.accuracy.source != "supernet" or config.supernet.start is None:
        raise ConfigError("compare: [fixed] fine-tunes the network whose trained weights the supernet starts from, and "
                          "this configuration names none; set supernet.start (with accuracy: supernet), or leave out "
                          "compare")
    found = look_ups(config)
    if found and (config.budgets.together or len(found) == len(config.targets)):
        raise ConfigError(f"compare: [fixed] times files, and target {found[0]} only looks latencies up; choose "
                          "another target, or leave out compare")


def resolutions_of(space: SearchSpace) -> tuple[int, ...]:
    """Those of the space's token (or its only one), and every multiple of STEP between the smallest and the largest."""
    own = {int(value) for choice in space.choices if choice.name == TOKEN for value in choice.values}
    own = own or {int(space.graph(space.extremes()[1]).input_shape[-1])}
    between = range(-(-min(own) // STEP) * STEP, max(own) + 1, STEP)
    return tuple(sorted(own | set(between)))


class FixedNetworks:
    """The largest architecture of the run's space at each of `resolutions` (those of `resolutions_of`, if none are
    given). `space` is one whose only choice that matters here is the resolution."""

    def __init__(self, config: Config, classes: int, channels: int, resolutions: Sequence[int] = ()) -> None:
        whole = {"name": config.space.name, **config.space.options}
        if config.space.name == ELITE:
            base = config.space.options["base"]
            whole = {"name": base} if isinstance(base, str) else dict(base)
        name, options = str(whole.pop("name")), whole
        given = make_space(name, classes=classes, channels=channels, options=options)
        self.resolutions = tuple(resolutions) or resolutions_of(given)
        self.space = make_space(name, classes=classes, channels=channels, options=options | {
            TOKEN: list(self.resolutions)})
        settings, self.seed, self._start = supernet_settings(config), config.seed, config.supernet.start
        self.settings = TuningSettings(
            config.supernet.epochs + config.delivery.fine_tune_epochs, config.supernet.learning_rate,
            settings.batch_size, settings.seed, settings.augmentation, settings.calibration_images)

    def tokens(self, resolution: int) -> Tokens:
        row = self.space.extremes()[1]
        for position, choice in enumerate(self.space.choices):
            if choice.name == TOKEN:
                row[position] = self.resolutions.index(resolution)
        return self.space.canonical(row[None])[0]

    def resolution(self, tokens_T: Sequence[int] | Tokens) -> int:
        return int(self.space.graph(np.asarray(tokens_T, dtype=np.int8)).input_shape[-1])

    def start(self) -> dict[str, NDArray[Any]]:
        """State dict to start from, the same at every resolution."""
        assert self._start is not None, "check_comparison comes first"
        return arrays(started(self._start, self.seed, self.space).extract(self.tokens(self.resolutions[-1])))

    def told(self) -> dict[str, Any]:
        """How the weights come about, for the sidecar."""
        return {"start": self._start, "fine_tune_epochs": self.settings.epochs,
                "fine_tune_learning_rate": self.settings.learning_rate}


def fixed_accuracies(config: Config, splits: Splits, preprocessing: Preprocessing, resolution: int, folder: AnyPath,
                     threads: int = 1) -> dict[str, float]:
    """Accuracy on `validation` and `test` of the fixed network at a resolution, by its exported file; trained here and
    now, or gone on with from what `folder` holds."""
    fixed = FixedNetworks(config, len(splits.classes), splits.channels, [resolution])
    graph = fixed.space.graph(fixed.tokens(resolution))
    own = replace(preprocessing, resolution=resolution)
    weights: dict[str, NDArray[Any]] = tuned_weights(graph, fixed.start(), splits.train, own, fixed.settings,
                                                     folder, threads)
    model = to_onnx(graph, weights, batch=None).SerializeToString()
    return {"validation": file_accuracy(model, splits.val, own), "test": file_accuracy(model, splits.test, own)}
