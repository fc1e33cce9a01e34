"""The files beside a traced model: TorchServe's settings, labels, sample requests."""

from __future__ import annotations

import json
from pathlib import Path

from ft_handler.files import CONFIG_FILE, LABELS_FILE, SAMPLE_REQUEST, SAMPLE_TEXT
from ft_handler.model.info import ModelInfo
from ft_handler.tasks.base import AnyTask


def write_settings(task: AnyTask, info: ModelInfo, longest: int, output: Path) -> None:
    """Write model-config.yaml, the labels where there are some, and the sample requests."""

    def write(name: str, text: str) -> None:
        (output / name).write_text(text, encoding="utf-8")

    write(CONFIG_FILE, model_config(info, longest))
    if task.labelled:
        labels = {str(i): name for i, name in sorted(info.labels.items())}
        write(LABELS_FILE, json.dumps(labels, ensure_ascii=False, indent=1) + "\n")
    write(SAMPLE_REQUEST, json.dumps(dict(task.sample), indent=1) + "\n")
    write(SAMPLE_TEXT, task.sample_text() + "\n")


def model_config(info: ModelInfo, longest: int) -> str:
    """The text of model-config.yaml."""
    return f"""\
# TorchServe's settings of this model; they beat config.properties.
minWorkers: 1
maxWorkers: 1
batchSize: 32
# Milliseconds to wait for a batch to fill; 0 would become 100.
maxBatchDelay: 5
# Seconds.
responseTimeout: 120
startupTimeout: 300

# The handler's settings; docs/configuration.md lists them all with their defaults.
handler:
  mode: {info.mode}
  max_length: {longest}
"""
