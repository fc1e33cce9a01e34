"""Fixtures every test may use: seeds, tiny random models, optional data. Nothing downloads."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from tiny import write_tiny_bert, write_tokenizer

# A busy machine is no failure: examples have no deadline.
hypothesis.settings.register_profile("repository", deadline=None)
hypothesis.settings.load_profile("repository")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_bert(head, **config)` writes one more tiny checkpoint and returns its folder."""

    def make(head: str = "sequence_classification", **settings: Any) -> Path:
        return write_tiny_bert(tmp_path_factory.mktemp("bert"), head, **settings)

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer's files alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classification(make_tiny_bert: Callable[..., Path]) -> Path:
    """A random BERT with three labels: hidden 64, 2 heads, 2 layers, 128 positions."""
    return make_tiny_bert("sequence_classification")


@pytest.fixture(scope="session")
def tiny_qa(make_tiny_bert: Callable[..., Path]) -> Path:
    """A random BERT with a question-answering head, otherwise like `tiny_classification`."""
    return make_tiny_bert("question_answering")


@pytest.fixture(scope="session")
def tiny_tokens(make_tiny_bert: Callable[..., Path]) -> Path:
    """A random BERT that labels tokens, otherwise like `tiny_classification`."""
    return make_tiny_bert("token_classification")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of optional development data, `$FT_HANDLER_SHARED` or `../shared`; skips without."""
    folder = Path(os.environ.get("FT_HANDLER_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no development data in {folder} (FT_HANDLER_SHARED)")
    return folder


def gpu_obstacle() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from ft_handler import FtHandlerError, load_library

    try:
        load_library()
    except FtHandlerError as error:
        return str(error)
    # The dispatcher knows what the loaded library really registered.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastertransformer::encoder", "CUDA"):
        return "the library was built without CUDA: fastertransformer::encoder has no CUDA kernel"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests with the reason printed."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    reason = gpu_obstacle()
    if reason:
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=reason))
