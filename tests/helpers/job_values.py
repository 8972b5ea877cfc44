"""A callback of Hydra that keeps what a job returns to its sweeper."""

import json
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback

KEEP = "+hydra.callbacks.keep._target_=helpers.job_values.KeepValue"


class KeepValue(Callback):
    """Writes value.json into the folder of each job."""

    def on_job_end(self, config: Any, job_return: JobReturn, **_: Any) -> None:
        folder = Path(job_return.hydra_cfg.hydra.runtime.output_dir)
        (folder / "value.json").write_text(json.dumps(job_return.return_value))


def value(folder: Path) -> float | None:
    return json.loads((folder / "value.json").read_text())
