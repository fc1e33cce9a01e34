"""What an architecture is: how a family's checkpoints become the fused encoder, as one object.

An architecture is one file with one object of a class derived from `Architecture`. Most of them are
a table of names; what a family does otherwise (positions that start elsewhere, another name for a
size, a head of its own) it says by overriding a method.

The fused encoder's weights, V words, P positions, E embedding size, H hidden, I intermediate, and
L layers, or 1 where all layers share their weights:

  embeddings.word [V,E]  embeddings.position [P,E]  embeddings.token_type [types,E]
  embeddings.norm.weight, .bias [E]
  embeddings.projection.weight [H,E], .bias [H]   where E is not H, or where a family always has one
  attention.relative_bias [heads,2D+1]            where `EncoderSpec.relative_distance` D is not 0
  layers.qkv.weight [L,3H,H], .bias [L,3H]   layers.out.weight [L,H,H], .bias [L,H]
  layers.norm1.weight, .bias [L,H]           layers.up.weight [L,I,H], .bias [L,I]
  layers.down.weight [L,H,I], .bias [L,H]    layers.norm2.weight, .bias [L,H]
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ft_handler.errors import ModelError
from ft_handler.model.heads import HeadModule
from ft_handler.model.spec import EncoderSpec
from ft_handler.tasks.base import AnyTask, Head

LARGEST_HEAD = 128
POSITIONS = "embeddings.position"
TOKEN_TYPES = "embeddings.token_type"
LAYERS = "layers."
#: Auto class of the classifiers, whose heads differ most.
CLASSIFIERS = "AutoModelForSequenceClassification"
#: transformers' activations -> the fused ones. Names of one line differ in how they round.
ACTIVATIONS: Mapping[str, str] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
        "gelu_tanh",
    ),
    "relu": "relu",
    **dict.fromkeys(("silu", "swish"), "silu"),
}


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors in fp32: the encoder's by fused names, the head's by its arguments."""

    encoder: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


class Architecture:
    """One family of models.

    model_type  transformers' name of it
    title       its name as people write it
    base        the encoder's prefix in a state dict, `{base}` in names; the state dict of the
                encoder alone goes without it
    table       fused name -> its names in a state dict; several are concatenated along the outputs.
                `{layer}` stands for the layer's number: names of layers without it are shared
    ignored     matches the tensors that a checkpoint may carry and the fused model does without;
                `{base}` works here too
    training    matches the tensors that only training reads, which some checkpoints keep
    accepted    fields of the configuration -> the values served; an absent field has the first
    activation  the field that names the feed-forward block's activation
    heads       by transformers' auto class: heads of its models here, where that of the tasks that
                load it (`Task.head`) does not fit
    unserved    by transformers' auto class: why tasks that load it are refused
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    base: ClassVar[str]
    table: ClassVar[Mapping[str, tuple[str, ...]]]
    ignored: ClassVar[str] = r"(?!)"
    training: ClassVar[str] = (
        r"fit_denses?\..*|(class|pos|label)_weights?"
        r"|(loss|loss_f(ct|n|unc|unction)|criterion)(\..*)?"
    )
    accepted: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
        "pruned_heads": (None, {}),
    }
    activation: ClassVar[str] = "hidden_act"
    heads: ClassVar[Mapping[str, Head]] = {}
    unserved: ClassVar[Mapping[str, str]] = {}

    # -- what a configuration says ---------------------------------------------------------------

    def spec(self, config: Any) -> EncoderSpec:
        """Sizes and choices of a configuration; raises ModelError for another activation."""
        return EncoderSpec(
            hidden_size=config.hidden_size,
            embedding_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            activation=self.fused_activation(config),
            layer_norm_eps=config.layer_norm_eps,
        )

    def fused_activation(self, config: Any) -> str:
        """The fused name of a configuration's activation; raises ModelError for one there is not.

        The field is the one that `activation` names.
        """
        named = getattr(config, self.activation)
        if named not in ACTIVATIONS:
            raise ModelError(
                f"{self.activation}={named!r} is not served; served: {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[named]

    def pad(self, config: Any) -> int | None:
        """The id that fills up batches, which positions may not count; None where there is none."""
        found = getattr(config, "pad_token_id", None)
        return None if found is None else int(found)

    def first_position(self, config: Any) -> int:
        """The row of the position table that a sequence's first token reads."""
        return 0

    def positions(self, config: Any) -> int:
        """How many tokens a sequence may have."""
        return int(config.max_position_embeddings) - self.first_position(config)

    def token_types(self, config: Any) -> int:
        """How many token types there are; 0 where the model knows none."""
        return int(getattr(config, "type_vocab_size", 0))

    def names(self, config: Any) -> Mapping[str, tuple[str, ...]]:
        """The names table of one configuration."""
        return self.table

    # -- what is served --------------------------------------------------------------------------

    def check(self, config: Any) -> None:
        """Raise ModelError naming what of a configuration is not served."""
        for name, served in self.accepted.items():
            value = getattr(config, name, served[0])
            if value not in served:
                raise ModelError(f"{name}={value!r} is not served; it must be {served[0]!r}")
        spec = self.spec(config)
        if spec.num_heads < 1 or spec.hidden_size % spec.num_heads:
            raise ModelError(
                f"hidden_size {spec.hidden_size} does not divide into {spec.num_heads} heads"
            )
        size = spec.hidden_size // spec.num_heads
        if size % 2 or size > LARGEST_HEAD:
            raise ModelError(f"head size {size} is not served; even sizes up to {LARGEST_HEAD} are")
        if self.positions(config) < 1:
            raise ModelError(f"{self.positions(config)} positions leave no room for a token")

    def head(self, task: AnyTask) -> Head:
        """The task's head with the names it has here; raises ModelError for an unserved task."""
        if why := self.unserved.get(task.auto_class):
            raise ModelError(f"{self.model_type} is not served for {task.name}: {why}")
        head = self.heads.get(task.auto_class) or task.head()
        weights = {name: source.format(base=self.base) for name, source in head.weights.items()}
        return dataclasses.replace(head, weights=weights)

    def uses(self, head: Head, name: str) -> bool:
        """Whether the fused model needs a tensor of transformers' model."""
        own = {source.removeprefix(f"{self.base}.") for source in head.weights.values()}
        return name.removeprefix(f"{self.base}.") in own or not self.ignores(name)

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint's tensor is one that the fused model does without."""
        pattern = self.ignored.replace("{base}", re.escape(self.base))
        return re.fullmatch(pattern, name) is not None

    def trains(self, name: str) -> bool:
        """Whether a checkpoint's tensor is one that only training reads."""
        return re.fullmatch(self.training, name) is not None

    # -- weights ---------------------------------------------------------------------------------

    def weights(self, task: AnyTask, config: Any, state: Mapping[str, Tensor]) -> Weights:
        """A state dict's tensors as the fused model wants them.

        Raises ModelError listing the names that are missing and the tensors without a use.
        """
        prefix = f"{self.base}."
        if not any(name.startswith(prefix) for name in state):  # the encoder alone
            state = {prefix + name: tensor for name, tensor in state.items()}
        layers = self.spec(config).num_layers
        sources = {name: self._sources(parts, layers) for name, parts in self.names(config).items()}
        head = self.head(task).weights
        wanted = {n for groups in sources.values() for group in groups for n in group}
        wanted.update(head.values())
        if missing := sorted(wanted - state.keys()):
            raise ModelError(f"lacks {listed(missing)}")
        if unknown := sorted(n for n in state.keys() - wanted if not self.ignores(n)):
            raise ModelError(f"holds tensors the fused model has no use for: {listed(unknown)}")
        encoder = {}
        for name, groups in sources.items():
            parts = [torch.cat([state[n].float() for n in group]) for group in groups]
            encoder[name] = torch.stack(parts) if name.startswith(LAYERS) else parts[0]
        encoder = self.shaped(config, encoder)
        return Weights(encoder, {name: state[source].float() for name, source in head.items()})

    def shaped(self, config: Any, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's tensors, read by name, in the shapes that the fused model has."""
        shaped = dict(encoder)
        first = self.first_position(config)
        shaped[POSITIONS] = shaped[POSITIONS][first : first + self.positions(config)]
        # Without token types every token is of type 0, whose row adds nothing.
        shaped.setdefault(TOKEN_TYPES, torch.zeros_like(shaped[POSITIONS][:1]))
        return shaped

    def _sources(self, parts: tuple[str, ...], layers: int) -> list[list[str]]:
        """A fused weight's names in the state dict: a list a layer, one where layers share."""
        shared = not any("{layer}" in part for part in parts)
        return [
            [part.format(base=self.base, layer=i) for part in parts]
            for i in range(1 if shared else layers)
        ]


def weight_and_bias(modules: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """A table's entries for modules that have both: fused name -> their names."""
    return {
        f"{fused}.{kind}": tuple(f"{name}.{kind}" for name in names)
        for fused, names in modules.items()
        for kind in ("weight", "bias")
    }


def summary_head(
    module: type[HeadModule], dense: str = "classifier.dense", out: str = "classifier.out_proj"
) -> Head:
    """A head of two linear layers over the first token, under their names in a state dict."""
    return Head(
        module,
        {
            "pooler_weight": f"{dense}.weight",
            "pooler_bias": f"{dense}.bias",
            "classifier_weight": f"{out}.weight",
            "classifier_bias": f"{out}.bias",
        },
        out,
    )


def listed(names: list[str], most: int = 6) -> str:
    """The first few names, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
