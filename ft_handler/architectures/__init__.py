"""The architectures there are, one file each.

A new one is its file and a line in `_HOMES`; `register` makes one known that lives elsewhere.
"""

from __future__ import annotations

import importlib

from ft_handler.architectures.base import Architecture
from ft_handler.errors import ModelError

#: transformers' `model_type` -> the module whose `ARCHITECTURE` serves it.
_HOMES = {
    "bert": "ft_handler.architectures.bert",
    "roberta": "ft_handler.architectures.roberta",
    "xlm-roberta": "ft_handler.architectures.xlm_roberta",
    "camembert": "ft_handler.architectures.camembert",
    "distilbert": "ft_handler.architectures.distilbert",
    "electra": "ft_handler.architectures.electra",
    "albert": "ft_handler.architectures.albert",
    "mpnet": "ft_handler.architectures.mpnet",
}
#: What stands between the fused encoder and families that are asked for -> their model types.
_OPEN = {
    "its attention is disentangled": ("deberta", "deberta-v2"),
    "its positions are rotary": (
        *("modernbert", "eurobert", "nomic_bert", "gte", "jina_embeddings_v3"),
    ),
    "its norms come before the sums": ("xlm-roberta-xl", "roberta-prelayernorm", "megatron-bert"),
    "it generates text": (
        *("gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
        *("phi", "phi3", "opt", "bloom", "t5", "mt5", "bart", "mbart", "pegasus", "marian"),
    ),
}

_registered: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture known; one of the same model type is replaced."""
    _registered[architecture.model_type] = architecture


def unregister(model_type: str) -> None:
    """Forget an architecture that was registered."""
    _registered.pop(model_type, None)


def names() -> tuple[str, ...]:
    """The model types served, in order."""
    return tuple(sorted({*_HOMES, *_registered}))


def get(model_type: str) -> Architecture:
    """The architecture of transformers' `model_type`; raises ModelError naming those served."""
    if model_type in _registered:
        return _registered[model_type]
    if model_type not in _HOMES:
        why = next((f": {why}" for why, types in _OPEN.items() if model_type in types), "")
        raise ModelError(
            f"architecture {model_type!r} is not served{why}; served: {', '.join(names())}"
        )
    found = importlib.import_module(_HOMES[model_type]).ARCHITECTURE
    assert isinstance(found, Architecture)
    return found
