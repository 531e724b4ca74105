"""One root exception for everything a user can cause or should read.

It lives in the lowest layer so that spaces, actors and the orchestrator raise the same family. Every message is one
sentence that says what happened, with which value, what is allowed and what to do. All of them survive pickling,
because actors raise them across process boundaries (single string argument, no custom `__init__`).
"""


class ParetorayError(Exception):
    """Root of the errors shown to a user as one sentence, without a traceback."""


class ConfigError(ParetorayError):
    """A configuration file, option or argument is not usable."""


class DataError(ParetorayError):
    """A dataset is missing, malformed or holds a value outside its range."""


class SpaceError(ParetorayError):
    """A token row or a search space breaks its contract."""


class TargetError(ParetorayError):
    """A latency target is absent, unhealthy or cannot run a graph."""


class NoDeviceError(TargetError):
    """This machine has no device of a kind, and no trouble with one either."""


class DeviceRestingError(TargetError):
    """A device cannot measure now and will again by itself: it is hot, or somebody else uses it."""


class BudgetError(ParetorayError):
    """A latency budget cannot be met by any architecture of the space on this target."""


class StoreError(ParetorayError):
    """A run folder, trial part or checkpoint is missing, damaged or cannot be written."""


class ClusterError(ParetorayError):
    """A Ray cluster cannot be reached or lacks the resources a run needs."""


class EvaluationError(ParetorayError):
    """One architecture could not be evaluated; the search goes on without it."""
