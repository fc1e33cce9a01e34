"""sentence-transformers' files beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}


def write_json(folder: Path, name: str, document: Any) -> None:
    """Write a JSON file, and the folder that its name has."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def write_modules(
    folder: Path,
    *poolings: str,
    normalize: bool = False,
    dense: str | None = None,
    width: int = 64,
    outputs: int = 24,
) -> Path:
    """modules.json and the modules' folders: the poolings, a dense layer with its activation."""
    kinds = ["Transformer", "Pooling", *["Dense"] * (dense is not None), *["Normalize"] * normalize]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if kind == "Transformer" else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(folder, "modules.json", modules)
    modes = {key: mode in poolings for mode, key in _KEYS.items()}
    write_json(folder, "1_Pooling/config.json", {"word_embedding_dimension": width, **modes})
    if dense is not None:
        from safetensors.torch import save_file

        home = "linear" if dense == "Identity" else "activation"
        activation = f"torch.nn.modules.{home}.{dense}"
        write_json(
            folder, "2_Dense/config.json",
            {"in_features": width, "out_features": outputs, "activation_function": activation},
        )  # fmt: skip
        weights = {
            "linear.weight": torch.randn(outputs, width) / width**0.5,
            "linear.bias": torch.randn(outputs),
        }
        save_file(weights, str(folder / "2_Dense" / "model.safetensors"))
    return folder
