"""MLflow: files in `mlflow/` of the run's folder, or at MLFLOW_TRACKING_URI where that is set.

`MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlflow` shows them. https://mlflow.org/docs/latest/
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .trackers import About, Histogram, table

LONGEST = 500  # characters of a parameter's value


class MLflow:
    rewinds = False

    def __init__(self, about: About):
        self.client: Any = _client(about)
        self.run = about.id
        known = self.client.get_run(self.run).data.params
        for key, value in about.settings.items():  # a parameter is set once
            if key not in known:
                self.client.log_param(self.run, key, str(value)[:LONGEST])
        self.client.set_terminated(self.run, "RUNNING")

    @staticmethod
    def new_id(about: About) -> str:
        """MLflow gives a run its name itself."""
        client = _client(about)
        found = client.get_experiment_by_name(about.project)
        experiment = found.experiment_id if found else client.create_experiment(about.project)
        return client.create_run(experiment, run_name=about.name).info.run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.client.log_metric(self.run, key, value, step=step)

    def samples(self, step: int, rows: Sequence[Mapping]) -> None:
        columns, cells = table(rows)
        self.client.log_dict(self.run, {"columns": columns, "data": cells}, f"answers/step-{step:08}.json")

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        made = {key: {"counts": h.counts, "edges": h.edges} for key, h in found.items()}
        self.client.log_dict(self.run, made, f"histograms/step-{step:08}.json")

    def finish(self, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self.client.log_metric(self.run, f"final/{key}", value)
        self.client.set_terminated(self.run, "FINISHED")

    def close(self) -> None:
        """A run that only stopped stays "running": it is resumed under the same name."""


def _client(about: About) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # needs no database
    from mlflow.tracking import MlflowClient  # type: ignore[import-not-found]

    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", (about.folder.resolve() / "mlflow").as_uri()))


TRACKER = MLflow
