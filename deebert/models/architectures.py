"""A table of the structure of Hugging Face encoders, with one row for each model type.

No other module knows this structure. The module knows nothing of weights, tokenizers, ramps or
exits. `encoder` is the library's own model. Shapes: B batch, S tokens, H hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
)

from deebert.errors import UserError, first_line, is_whole
from deebert.models.layer_parts import EmbeddingParts, LayerParts
from deebert.untrusted import plain_files
from deebert.untrusted.plain_files import LAYERS

# Settings of every model type. Ramps need the separator: it stands between two texts.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def embedding_parts(encoder: Any) -> EmbeddingParts:
    """Return the parts of the embeddings of an encoder whose layers have parts.

    All these encoders have the same names for them.
    """
    kind, embeddings = architecture(encoder.config.model_type), encoder.embeddings
    first = kind.first_position(encoder.config.to_dict())
    return EmbeddingParts(
        words=embeddings.word_embeddings,
        types=getattr(embeddings, "token_type_embeddings", None),
        typed=kind.embed is not _embed,
        positions=embeddings.position_embeddings,
        padding=first - 1 if first else None,
        norm=embeddings.LayerNorm,
        projection=getattr(encoder, "embeddings_project", None),
    )


def _bert_parts(encoder: Any, layer: Any) -> LayerParts:
    attention, feed_forward = layer.attention, layer.intermediate
    return LayerParts(
        query=attention.self.query,
        key=attention.self.key,
        value=attention.self.value,
        output=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        up=feed_forward.dense,
        activation=feed_forward.intermediate_act_fn,
        down=layer.output.dense,
        norm=layer.output.LayerNorm,
    )


def _distilbert_parts(encoder: Any, layer: Any) -> LayerParts:
    return LayerParts(
        query=layer.attention.q_lin,
        key=layer.attention.k_lin,
        value=layer.attention.v_lin,
        output=layer.attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        up=layer.ffn.lin1,
        activation=layer.ffn.activation,
        down=layer.ffn.lin2,
        norm=layer.output_layer_norm,
    )


def _mpnet_parts(encoder: Any, layer: Any) -> LayerParts:
    attention, feed_forward, stack = layer.attention, layer.intermediate, encoder.encoder
    biases = stack.relative_attention_bias.weight.detach()
    last = longest_input(encoder.config.to_dict()) - 1
    distances_D = torch.arange(-last, last + 1, device=biases.device)
    return LayerParts(
        query=attention.attn.q,
        key=attention.attn.k,
        value=attention.attn.v,
        output=attention.attn.o,
        attention_norm=attention.LayerNorm,
        up=feed_forward.dense,
        activation=feed_forward.intermediate_act_fn,
        down=layer.output.dense,
        norm=layer.output.LayerNorm,
        bias_AD=biases[stack.relative_position_bucket(distances_D)].T.contiguous(),
    )


def _embed(encoder: Any, ids_BS: Tensor, mask_BS: Tensor, types_BS: Tensor | None) -> Tensor:
    return encoder.embeddings(input_ids=ids_BS)


def _embed_typed(encoder: Any, ids_BS: Tensor, mask_BS: Tensor, types_BS: Tensor | None) -> Tensor:
    return encoder.embeddings(input_ids=ids_BS, token_type_ids=types_BS)


def _embed_electra(
    encoder: Any, ids_BS: Tensor, mask_BS: Tensor, types_BS: Tensor | None
) -> Tensor:
    words_BSE = _embed_typed(encoder, ids_BS, mask_BS, types_BS)
    # The projection exists only where embeddings and layers have different sizes.
    return getattr(encoder, "embeddings_project", nn.Identity())(words_BSE)


def _embed_deberta(
    encoder: Any, ids_BS: Tensor, mask_BS: Tensor, types_BS: Tensor | None
) -> Tensor:
    return encoder.embeddings(input_ids=ids_BS, token_type_ids=types_BS, mask=mask_BS)


def _mask(encoder: Any, hidden_BSH: Tensor, mask_BS: Tensor) -> Any:
    return create_bidirectional_mask(
        config=encoder.config, inputs_embeds=hidden_BSH, attention_mask=mask_BS
    )


def _mpnet_context(encoder: Any, hidden_BSH: Tensor, mask_BS: Tensor) -> dict[str, Any]:
    return {
        "attention_mask": _mask(encoder, hidden_BSH, mask_BS),
        "position_bias": encoder.encoder.compute_position_bias(hidden_BSH),
    }


def _deberta_context(encoder: Any, hidden_BSH: Tensor, mask_BS: Tensor) -> dict[str, Any]:
    return {
        "attention_mask": encoder.encoder.get_attention_mask(mask_BS),
        "relative_pos": encoder.encoder.get_rel_pos(hidden_BSH),
        "rel_embeddings": encoder.encoder.get_rel_embedding(),
    }


def _modernbert_context(encoder: Any, hidden_BSH: Tensor, mask_BS: Tensor) -> dict[str, Any]:
    """Return the arguments of a layer for each type of attention."""
    positions = torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device)[None]
    masks = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }
    return {
        kind: {
            "attention_mask": masks[kind](
                config=encoder.config, inputs_embeds=hidden_BSH, attention_mask=mask_BS
            ),
            "position_embeddings": encoder.rotary_emb(hidden_BSH, positions, kind),
        }
        for kind in set(encoder.config.layer_types)
    }


def _run(layer: Any, hidden_BSH: Tensor, context: Any) -> Tensor:
    return layer(hidden_BSH, context)


def _first_of_bert(layer: Any, hidden_BSH: Tensor, context: Any) -> Tensor:
    # Contiguous, because a linear map processes a slice one input after the other.
    mixed_B1H = layer.attention.self(hidden_BSH, context)[0][:, :1].contiguous()
    hidden_B1H = layer.attention.output(mixed_B1H, hidden_BSH[:, :1])
    return layer.output(layer.intermediate(hidden_B1H), hidden_B1H)


def _first_of_distilbert(layer: Any, hidden_BSH: Tensor, context: Any) -> Tensor:
    mixed_B1H = layer.attention(hidden_BSH, context)[0][:, :1].contiguous()
    hidden_B1H = layer.sa_layer_norm(mixed_B1H + hidden_BSH[:, :1])
    return layer.output_layer_norm(layer.ffn(hidden_B1H) + hidden_B1H)


def _run_first_of_tuple(layer: Any, hidden_BSH: Tensor, context: Any) -> Tensor:
    return layer(hidden_BSH, **context)[0]


def _run_modernbert(layer: Any, hidden_BSH: Tensor, context: Any) -> Tensor:
    return layer(hidden_BSH, **context[layer.attention_type])


def _nothing(
    encoder: Any, index: int, before_BSH: Tensor, hidden_BSH: Tensor, context: Any
) -> Tensor:
    return hidden_BSH


def _convolution(
    encoder: Any, index: int, before_BSH: Tensor, hidden_BSH: Tensor, context: Any
) -> Tensor:
    if index > 0 or encoder.encoder.conv is None:
        return hidden_BSH
    mask_BS = context["attention_mask"].squeeze(1).diagonal(dim1=1, dim2=2)  # (B, 1, S, S): i * j
    return encoder.encoder.conv(before_BSH, hidden_BSH, mask_BS)


def _final_norm(
    encoder: Any, index: int, before_BSH: Tensor, hidden_BSH: Tensor, context: Any
) -> Tensor:
    return encoder.final_norm(hidden_BSH) if index == len(encoder.layers) - 1 else hidden_BSH


@dataclass(frozen=True)
class Architecture:
    """The structure of one model type. The defaults are BERT's, without token types.

    Attributes:
        layers: path of the ModuleList of layers.
        pooler: True if the pretrained model has a pooler, which an argument can leave out.
        parts: encoder, layer -> the layer's parts; None if its layers cannot be run in parts.
        embed: encoder, ids, mask, token types or None -> the states before layer 1.
        context: encoder, states, mask -> the arguments of a layer besides the states.
        run: layer, states, context -> states.
        run_for_first: `run` for the first token alone, (B, S, H) -> (B, 1, H), with dropout and
            gradients. None if only whole layers can be run, or if `after` reads other tokens.
        after: encoder, index of the layer, states before and after it, context -> the states that
            the next layer and the ramp get.
        first_position: configuration -> the position number of the first token.
        first_is_special: True if the structure of layer 1 differs from that of the other layers.
        more_settings: settings without a default that the library reads if they exist.
    """

    layers: str = "encoder.layer"
    pooler: bool = False
    parts: Callable[[Any, Any], LayerParts] | None = None
    embed: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor] = _embed
    context: Callable[[Any, Tensor, Tensor], Any] = _mask
    run: Callable[[Any, Tensor, Any], Tensor] = _run
    run_for_first: Callable[[Any, Tensor, Any], Tensor] | None = None
    after: Callable[[Any, int, Tensor, Tensor, Any], Tensor] = _nothing
    first_position: Callable[[Mapping[str, Any]], int] = lambda config: 0
    first_is_special: bool = False
    more_settings: tuple[str, ...] = ()


_ROBERTA = Architecture(
    pooler=True,
    parts=_bert_parts,
    run_for_first=_first_of_bert,
    first_position=lambda config: config["pad_token_id"] + 1,
)
ARCHITECTURES = {
    "bert": Architecture(
        pooler=True, parts=_bert_parts, embed=_embed_typed, run_for_first=_first_of_bert
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Architecture(parts=_bert_parts, embed=_embed_electra, run_for_first=_first_of_bert),
    "distilbert": Architecture(
        "transformer.layer", parts=_distilbert_parts, run_for_first=_first_of_distilbert
    ),
    "mpnet": Architecture(
        pooler=True,
        parts=_mpnet_parts,
        context=_mpnet_context,
        run=_run_first_of_tuple,
        first_position=lambda config: 2,  # RoBERTa's rule in the library, for padding id 1
    ),
    "deberta-v2": Architecture(  # DeBERTa-v3 has this model type, too
        embed=_embed_deberta,
        context=_deberta_context,
        run=_run_first_of_tuple,
        after=_convolution,
        more_settings=(
            "position_buckets",
            "norm_rel_ebd",
            "share_att_key",
            "conv_kernel_size",
            "conv_act",
            "conv_groups",
            "attention_head_size",
            "embedding_size",
            "cls_dropout",
        ),
    ),
    "modernbert": Architecture(
        "layers",
        context=_modernbert_context,
        run=_run_modernbert,
        after=_final_norm,
        first_is_special=True,  # it has no norm before its attention
        more_settings=(
            "head_dim",
            "local_rope_theta",
            "global_rope_theta",
            "global_attn_every_n_layers",
        ),
    ),
}


def architecture(model_type: str) -> Architecture:
    """Return the structure of a model type.

    Raises:
        UserError: the type is not in the table.
    """
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"backbone of type {model_type!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)} (backbone=..., or backbone.path=a model of these types)"
        )
    return ARCHITECTURES[model_type]


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the model type in `given`, completed with the defaults.

    Other values are left out: code, kernels, a precision, labels, paths.

    Args:
        given: plain values of a configuration that somebody else may have written.

    Raises:
        UserError: the values do not fit the model type.
    """
    model_type = given.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("its configuration says no model_type")
    more = architecture(model_type).more_settings  # an error for a type that is not in the table
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map, *more, *TOKEN_IDS}
    known -= set(PreTrainedConfig().to_dict())
    chosen = {name: given[name] for name in sorted(known & set(given))}
    chosen = plain_files.plain(chosen, "its configuration")
    for name in ("num_hidden_layers", "n_layers"):
        if is_whole(count := chosen.get(name, 1)) and not 1 <= count <= LAYERS:
            raise UserError(f"{name}={count!a} must be a whole number from 1 to {LAYERS}")
    try:
        completed = AutoConfig.for_model(model_type, **chosen).to_dict()
        longest_input(completed)  # an error if a setting that it reads is missing
    except Exception as error:  # the library checks its settings in many ways
        raise UserError(f"its configuration is of no {model_type} ({first_line(error)})") from error
    return completed


def keep_layers(encoder: Any, layers: list[int], flag: str) -> None:
    """Remove all other layers, and change the configuration to match.

    A norm after the last layer (ModernBERT) and a convolution after the first layer (DeBERTa)
    belong to the place and not to the layer: they stay there.

    Args:
        encoder: the library's model; it is changed.
        layers: the layers to keep, from 1.
        flag: name of the setting, for messages.

    Raises:
        UserError: these are not some of its layers in their order, or layer 1 cannot be removed.
    """
    config, kind = encoder.config, architecture(encoder.config.model_type)
    existing = encoder.get_submodule(kind.layers)
    given = layers if isinstance(layers, list) else []
    kept = [index for index in range(len(existing)) if index + 1 in given]
    if not kept or [index + 1 for index in kept] != given:
        raise UserError(
            f"{flag}={layers} must be a list of layers from 1 to {len(existing)}, in their order "
            f"(every other one: {flag}=[{','.join(map(str, range(1, len(existing) + 1, 2)))}])"
        )
    if kind.first_is_special and kept[0] != 0:
        raise UserError(
            f"{flag}={layers}: layer 1 of a {config.model_type} is unlike the others and must stay"
        )
    encoder.set_submodule(kind.layers, nn.ModuleList(existing[index] for index in kept))
    config.num_hidden_layers = len(kept)
    if types := getattr(config, "layer_types", None):  # ModernBERT: the attention of each layer
        config.layer_types = [types[index] for index in kept]


def longest_input(config: Mapping[str, Any]) -> int:
    """Return the largest number of tokens of an input, from the plain values of a configuration."""
    first = architecture(config["model_type"]).first_position(config)
    return int(config["max_position_embeddings"]) - first
