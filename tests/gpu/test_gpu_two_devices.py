"""Two GPUs of one host: a worker computes on the one it was given, touches no other, same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

# What a worker does with the `gpu_id` that its server gave it.
WORKER = """
import ctypes, json, sys
from pathlib import Path
from ft_handler.config import RawSettings
from ft_handler.runtime import open_model
from ft_handler.types import Incoming

def has_context(gpu):
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int(-1)
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuDeviceGet(ctypes.byref(device), gpu) == 0
    state = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    assert state == 0
    return bool(active.value)

folder, gpu, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
ready = open_model(folder, RawSettings.of_model_dir(folder, None), gpu=gpu)
replies, _ = ready.pipeline.run([Incoming(f"word {n} " * (n + 1)) for n in range(40)])
assert all(reply.status == 200 for reply in replies)
told = {
    "device": str(ready.device),
    "contexts": [device for device in range(count) if has_context(device)],
    "bodies": [reply.body.decode() for reply in replies],
}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(make_tiny_bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ft_handler.prepare.options import TraceOptions
    from ft_handler.prepare.trace import trace

    source = make_tiny_bert("sequence_classification", initializer_range=0.1)
    output = tmp_path_factory.mktemp("traced")
    trace(
        TraceOptions(
            mode="sequence_classification",
            model_name_or_path=str(source),
            output=output,
            data_type="fp16",
        )
    )
    return output


def answers(folder: Path, gpu: int) -> list[str]:
    """What a worker on this GPU answers; it must have a context on no other."""
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder), str(gpu), str(torch.cuda.device_count())],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    told = json.loads(worker.stdout.splitlines()[-1])
    assert told["device"] == f"cuda:{gpu}"
    assert told["contexts"] == [gpu]
    bodies: list[str] = told["bodies"]
    return bodies


def test_each_worker_has_its_own_gpu_and_the_same_answers(folder):
    first = answers(folder, 0)
    assert len(set(first)) > 1
    assert answers(folder, 1) == first
