"""Backbones: encoders that run layer by layer, loaded with their tokenizers.

A backbone comes from the hub, a folder or a package, or has random weights. The module knows
nothing of ramps, tasks or exits, and not the structure of a model type (`architectures` does).
Shapes: B batch, S tokens, H hidden.
"""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any, Self

import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deebert.errors import UserError, first_line
from deebert.models import architectures, packages
from deebert.models.architectures import Architecture, architecture, longest_input
from deebert.models.layer_parts import EmbeddingParts, LayerParts


@dataclass(frozen=True)
class BackboneConfig:
    """The place of a backbone: the block `backbone` of the configuration.

    Attributes:
        name: the name, for messages and results.
        path: a local folder, or an id on the hub. None for random weights, or if it is not public.
        package: the folder with the weights inside of an installed package, or the pieces of a
            zip file with that folder (`packages.folder_of`).
        sha256: the hash of the weights in the package.
        install: the command that installs the package, for messages.
        epochs: the paper's number of epochs, which `experiment=deebert_paper` reads.
        lr: the learning rate that suits it in stage 1, or None for that of most.
        layers: the layers to keep, counted from 1; None for all.
        config: settings of a backbone with random weights.
    """

    name: str = "?"
    path: str | None = None
    package: str | list[str] | None = None
    sha256: str | None = None
    install: str | None = None
    epochs: int | None = None
    lr: float | None = None
    layers: list[int] | None = None
    config: Mapping[str, Any] | None = None

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Build it from the values of a file in `conf/backbone/`; other keys are passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


Spec = BackboneConfig | Mapping[str, Any]  # what names a backbone: typed, or a file's plain values


def typed(spec: Spec) -> BackboneConfig:
    """Return the typed form of what names a backbone."""
    return spec if isinstance(spec, BackboneConfig) else BackboneConfig.from_plain(spec)


class Backbone(nn.Module):
    """An encoder that is run layer by layer.

    `embed` followed by `run_layer` 0, 1, ... gives exactly the library's own forward pass.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def architecture(self) -> Architecture:
        """The structure of the model type; not an attribute, as lambdas cannot be pickled."""
        return architecture(self.encoder.config.model_type)

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers."""
        layers = self.encoder.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face configuration as plain values, from which `from_config` builds."""
        return self.encoder.config.to_dict()

    @property
    def hidden_size(self) -> int:
        """H, the size of a token's state."""
        return int(self.encoder.config.hidden_size)

    @property
    def classifier_dropout(self) -> float:
        """Dropout before a classifier, the same as in the library's own classification heads."""
        values = self.encoder.config.to_dict()
        names = (
            "classifier_dropout",
            "seq_classif_dropout",  # DistilBERT
            "cls_dropout",  # DeBERTa
            "hidden_dropout_prob",
        )
        return next(values[name] for name in names if values.get(name) is not None)

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return int(self.encoder.config.num_attention_heads)

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token."""
        return int(self.encoder.config.pad_token_id or 0)

    @property
    def separator(self) -> int | None:
        """Id of the token after the first of two texts; the configuration holds it."""
        return getattr(self.encoder.config, "sep_token_id", None)

    @separator.setter
    def separator(self, token: int | None) -> None:
        self.encoder.config.sep_token_id = token

    @property
    def longest_input(self) -> int:
        """Largest number of tokens of an input."""
        return longest_input(self.config)

    def keep_layers(self, layers: list[int], flag: str) -> None:
        """Remove all other layers (`architectures.keep_layers`)."""
        architectures.keep_layers(self.encoder, layers, flag)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Compute the states before layer 0 and the layers' context: (B, S) -> (B, S, H)."""
        hidden_BSH = self.embeddings(input_ids, attention_mask, token_type_ids)
        return hidden_BSH, self.context(hidden_BSH, attention_mask)

    def embeddings(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the states before layer 0: (B, S) ids and mask -> (B, S, H)."""
        return self.architecture.embed(self.encoder, input_ids, attention_mask, token_type_ids)

    def context(self, hidden_BSH: Tensor, attention_mask_BS: Tensor) -> Any:
        """Return the layers' other arguments; of the states it reads the shape and type only."""
        return self.architecture.context(self.encoder, hidden_BSH, attention_mask_BS)

    def run_layer(self, index: int, hidden_BSH: Tensor, context: Any) -> Tensor:
        """Run layer number `index`, from 0, on all tokens: (B, S, H) -> (B, S, H)."""
        after_BSH = self.architecture.run(self.layers[index], hidden_BSH, context)
        return self.architecture.after(self.encoder, index, hidden_BSH, after_BSH, context)

    def run_layer_for_first(self, index: int, hidden_BSH: Tensor, context: Any) -> Tensor:
        """Compute the first token of `run_layer` alone: (B, S, H) -> (B, 1, H).

        It is about a third of the work where layers can be run in parts. The numbers are equal up
        to rounding.
        """
        run = self.architecture.run_for_first
        if run is None:
            return self.run_layer(index, hidden_BSH, context)[:, :1]
        after_B1H = run(self.layers[index], hidden_BSH, context)
        return self.architecture.after(self.encoder, index, hidden_BSH[:, :1], after_B1H, context)

    def skip_layer(self, index: int, hidden_BSH: Tensor, context: Any) -> Tensor:
        """Return the states that `run_layer` gives if the layer itself does nothing.

        A norm after the last layer remains.
        """
        return self.architecture.after(self.encoder, index, hidden_BSH, hidden_BSH, context)

    @property
    def embedding_parts(self) -> EmbeddingParts:
        """The parts of `embeddings`, where layers can be run in parts."""
        return architectures.embedding_parts(self.encoder)

    def parts(self, index: int) -> LayerParts | None:
        """Return the parts of layer number `index`, from 0; None if it only runs as a whole."""
        parts = self.architecture.parts
        return None if parts is None else parts(self.encoder, self.layers[index])


def from_config(config: Mapping[str, Any]) -> Backbone:
    """Build a backbone with random weights from the plain values of its configuration.

    The model type's own pooler, if it has one, is left out, since each ramp has a pooler.
    """
    with_pooler = {"add_pooling_layer": False} if architecture(config["model_type"]).pooler else {}
    return Backbone(AutoModel.from_config(AutoConfig.for_model(**config), **with_pooler))


def pretrained(spec: Spec) -> tuple[Backbone, nn.Linear | None]:
    """Load a backbone with its pretrained weights.

    Args:
        spec: the place of the backbone, typed or as the values of a file in `conf/backbone/`.

    Returns:
        The backbone without a pooler, and the linear layer (H -> H) of the pretrained pooler, from
        which the ramps start. It is None where there is none (DistilBERT, random weights).

    Raises:
        UserError: it cannot be loaded, or the sha256 of its weights is wrong.
    """
    spec = typed(spec)
    if spec.config is not None:
        try:
            return from_config(random_config(spec)), None
        except UserError:
            raise
        except Exception as error:  # the library checks its sizes in many ways
            reason = first_line(error)
            raise UserError(f"backbone {spec.name}: {reason} (backbone.config.*)") from error
    path = _locate(spec)
    config = _load(AutoConfig.from_pretrained, path, spec)
    architecture(config.model_type)  # an error for an unknown type comes before a download
    verbosity = transformers.logging.get_verbosity()
    # Without this the library prints a table of unused heads, which would only worry users.
    transformers.logging.set_verbosity_error()
    try:
        encoder = _load(AutoModel.from_pretrained, path, spec)
    finally:
        transformers.logging.set_verbosity(verbosity)
    pooler = None
    if architecture(config.model_type).pooler:
        pooler = encoder.pooler.dense
        encoder.pooler = None
    return Backbone(encoder), pooler


def tokenizer(spec: Spec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone."""
    spec = typed(spec)
    if spec.config is not None:
        return _character_tokenizer()
    return _load(AutoTokenizer.from_pretrained, _locate(spec), spec)


def random_config(spec: Spec) -> dict[str, Any]:
    """Return the full configuration of a backbone with random weights (`backbone=tiny`)."""
    settings = typed(spec).config or {}
    architecture(settings["model_type"])
    _check_settings(settings)
    tokens = _character_tokenizer()
    # All special ids are set: the library warns if a default of the type is not in the vocabulary.
    names = [f"{kind}_token_id" for kind in ("pad", "bos", "eos", "cls", "sep")]
    special = {name: getattr(tokens, name) for name in names}
    return {"vocab_size": len(tokens), **special, **settings}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Check that something reads each setting of a backbone with random weights.

    They may be those of another type: `backbone=tiny` has a few that only some types read. The code
    of a type may read settings that its configuration does not declare.

    Raises:
        UserError: nothing reads a setting.
    """
    configs = [AutoConfig.for_model(name) for name in architectures.ARCHITECTURES]
    known = {name for each in configs for name in (*each.to_dict(), *each.attribute_map)}
    encoder = transformers.MODEL_MAPPING[type(AutoConfig.for_model(settings["model_type"]))]
    code = set(re.findall(r"\w+", inspect.getsource(sys.modules[encoder.__module__])))
    for key, value in settings.items():
        if key not in known | code:
            nearest = get_close_matches(key, known, 1, 0)[0]
            raise UserError(
                f"backbone.config.{key}={value}: nothing reads this key; the nearest known key is "
                f"backbone.config.{nearest}"
            )


def _character_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer that needs no file: its tokens are single ASCII characters."""
    characters = [*ascii_lowercase, *digits, *punctuation]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *(f"##{character}" for character in characters)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def _locate(spec: BackboneConfig) -> str:
    """Return the folder of installed packages, else the path or hub id.

    Raises:
        UserError: the weights in the packages do not have the sha256 of the configuration.
    """
    # A user's folder comes before the package.
    if not spec.package or Path(str(spec.path)).is_dir():
        return str(spec.path)
    try:
        return str(packages.folder_of(spec.package, spec.sha256) or spec.path)
    except UserError as error:
        raise UserError(f"backbone {spec.name}: {error}") from error


def _load(loader: Any, path: str, spec: BackboneConfig) -> Any:
    """Call a `from_pretrained` of the library, and turn its errors into a `UserError`."""
    try:
        return loader(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        package = "backbone=minilm (from the package installer)"
        if spec.install:
            package = f"the package installer ({spec.install})"
        raise UserError(
            f"backbone {spec.name}: cannot load {path!r} ({first_line(error)}). Without a network "
            f"use {package} or backbone.path=a local folder"
        ) from error
