"""A run to look at, finished or not: `open_run("mine")`. Nothing in its folder is changed, nobody is disturbed."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from actors.objectpath import AnyPath, ObjectPath, address_of, as_path
from orchestrator.config import Config, load_config
from orchestrator.handover.delivered import Delivered
from orchestrator.record.partfolder import read_parts
from orchestrator.record.store import TRIAL_SCHEMA, find_run
from orchestrator.report.data import RunView, read_run
from searchspaces.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class OpenedRun:
    """Every question is answered from the folder as it is now, so that a running run can be asked again."""

    path: AnyPath

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stage(self) -> str:
        """measure, train, search, deliver or done."""
        return str(self._view().state.get("stage", "measure"))

    @property
    def config(self) -> Config:
        return load_config(self.path / "config.yaml")

    def trials(self) -> pd.DataFrame:
        """One row per evaluation, in order; accuracy 0..1, latency in milliseconds, `error` where there is neither."""
        return read_parts(self.path / "trials", TRIAL_SCHEMA).sort_by("sequence").to_pandas()

    def models(self) -> pd.DataFrame:
        """One row per budget, with the columns of Delivered; `onnx` is the path of the file, empty without a model."""
        import pandas as pd

        table = pd.DataFrame(self._view().generated, columns=[field.name for field in fields(Delivered)])
        return table.assign(onnx=[address_of(self.path / file) if isinstance(file, str) and file else ""
                                  for file in table["onnx"]])

    def figure(self) -> go.Figure:
        """The trials, the Pareto front and the models, as in report.html. StoreError before the first trial."""
        from orchestrator.report.figures import front_figure

        figure = front_figure(self._view())
        if figure is None:
            raise StoreError(f"run {self.name} has no trials to draw yet (stage '{self.stage}'); ask again later")
        return figure

    def _view(self) -> RunView:
        return read_run(self.path)


def open_run(name: str | AnyPath, runs: str | AnyPath = "runs") -> OpenedRun:
    """A run by its name in the folder `runs`, or by the path of its own folder. StoreError where there is none."""
    return OpenedRun(find_run(as_path(runs), name.address if isinstance(name, ObjectPath) else str(name)))
