"""How long a run trains and searches, in one word: `training: quick`, `standard` or `long`.

A preset stands for single settings, which still may be given beside it and then win. From trained weights
(`supernet.start`) fewer epochs suffice, the first of them make the largest network a teacher, and most are left to the
hand-over: with equal sums of both, 2 + 6 gave better models than 4 + 4 (docs/photos.md).
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["quick", "standard", "long"]
Settings = Mapping[str, Mapping[str, Any]]

FROM_SCRATCH: Mapping[str, Settings] = {
    "quick": {"supernet": {"epochs": 10}, "search": {"evaluations": 100}, "latency": {"initial": 30, "maximum": 60},
              "delivery": {"alternatives": 3, "fine_tune_epochs": 4}},
    "standard": {"supernet": {"epochs": 30}, "search": {"evaluations": 300}, "delivery": {"fine_tune_epochs": 10}},
    "long": {"supernet": {"epochs": 120}, "search": {"evaluations": 600}, "delivery": {"fine_tune_epochs": 30}},
}
FROM_TRAINED: Mapping[str, Settings] = {
    "quick": {"supernet": {"epochs": 3, "teacher": 0.25}, "search": {"evaluations": 60},
              "latency": {"initial": 30, "maximum": 60}, "delivery": {"alternatives": 3, "fine_tune_epochs": 4}},
    "standard": {"supernet": {"epochs": 8, "teacher": 0.25}, "search": {"evaluations": 150},
                 "delivery": {"alternatives": 4, "fine_tune_epochs": 10, "fine_tuned": 2}},
    "long": {"supernet": {"epochs": 25, "teacher": 0.25}, "search": {"evaluations": 300},
             "delivery": {"fine_tune_epochs": 30, "fine_tuned": 3}},
}


def with_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what its preset says for settings that it does not give itself."""
    supernet = raw.get("supernet")
    started = isinstance(supernet, Mapping) and supernet.get("start") is not None
    chosen = (FROM_TRAINED if started else FROM_SCRATCH).get(str(raw.get("training")), {})
    filled = dict(raw)
    for section, values in chosen.items():
        given = filled.get(section, {})
        if isinstance(given, Mapping):      # what is none is an error that its check explains
            filled[section] = {**values, **given}
    return filled
