"""MPNet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ft_handler.architectures.base import CLASSIFIERS, Architecture, summary_head, weight_and_bias
from ft_handler.model.heads import PooledHead
from ft_handler.model.spec import EncoderSpec
from ft_handler.tasks.base import Head

_EMBEDDINGS = "{base}.embeddings."
_LAYER = "{base}.encoder.layer.{layer}."
_RELATIVE_BIAS = "attention.relative_bias"
#: transformers' model has these written into its code.
_PAD, _BUCKETS, _DISTANCE = 1, 32, 128


class MPNet(Architecture):
    """BERT's layers with a bias by distance, which all of them share; no token types."""

    model_type = "mpnet"
    title = "MPNet"
    base = "mpnet"
    table: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embeddings.word": (_EMBEDDINGS + "word_embeddings.weight",),
        "embeddings.position": (_EMBEDDINGS + "position_embeddings.weight",),
        _RELATIVE_BIAS: ("{base}.encoder.relative_attention_bias.weight",),
        **weight_and_bias(
            {
                "embeddings.norm": (_EMBEDDINGS + "LayerNorm",),
                "layers.qkv": (
                    _LAYER + "attention.attn.q",
                    _LAYER + "attention.attn.k",
                    _LAYER + "attention.attn.v",
                ),
                "layers.out": (_LAYER + "attention.attn.o",),
                "layers.norm1": (_LAYER + "attention.LayerNorm",),
                "layers.up": (_LAYER + "intermediate.dense",),
                "layers.down": (_LAYER + "output.dense",),
                "layers.norm2": (_LAYER + "output.LayerNorm",),
            }
        ),
    }
    ignored = r"lm_head\..*|({base}\.)?embeddings\.position_ids|({base}\.)?pooler\..*"
    accepted: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Architecture.accepted,
        "relative_attention_num_buckets": (_BUCKETS,),
    }
    heads: ClassVar[Mapping[str, Head]] = {CLASSIFIERS: summary_head(PooledHead)}

    def spec(self, config: Any) -> EncoderSpec:
        """BERT's, and the distance from which on the bias is the same."""
        return dataclasses.replace(super().spec(config), relative_distance=_DISTANCE)

    def pad(self, config: Any) -> int:
        """1, whatever a configuration says."""
        return _PAD

    def first_position(self, config: Any) -> int:
        """Behind the pad's number."""
        return _PAD + 1

    def token_types(self, config: Any) -> int:
        """None, even where a configuration has BERT's field."""
        return 0

    def shaped(self, config: Any, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bias `[buckets, heads]` by distance: `[heads, 2D + 1]`."""
        shaped = super().shaped(config, encoder)
        shaped[_RELATIVE_BIAS] = shaped[_RELATIVE_BIAS][buckets()].t().contiguous()
        return shaped


def buckets() -> Tensor:
    """The bucket of every distance, key minus query, from -D to D: int64 `[2D + 1]`.

    Half of them are for keys behind the query. Of each half, the first half are for one distance
    each, the others for ranges that grow to D by equal factors (Raffel et al., arXiv 1910.10683).
    """
    half = _BUCKETS // 2
    single = half // 2
    distances = torch.arange(-_DISTANCE, _DISTANCE + 1)
    apart = distances.abs()
    # In fp32 and in this order, as the model was trained: rounding decides at a range's edge.
    growth = torch.log(apart.clamp(min=1).float() / single) / math.log(_DISTANCE / single)
    ranged = (single + (growth * (half - single)).long()).clamp(max=half - 1)
    return half * (distances > 0) + torch.where(apart < single, apart, ranged)


ARCHITECTURE = MPNet()
