"""Where a backbone comes from (hub, folder, package, random weights), with its tokenizer; and the
class that runs it layer by layer.

Knows nothing of ramps, tasks or exits, nor of how a model type looks inside (architectures.py).
Shapes: B batch, S tokens, H hidden.
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

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
from deebert.models import architectures
from deebert.models.architectures import (
    Architecture,
    EmbeddingParts,
    LayerParts,
    architecture,
    longest_input,
)


class Backbone(nn.Module):
    """A pretrained encoder, run layer by layer.

    `embed` and then `run_layer` 0, 1, ... equals the library's own forward pass exactly.
    """

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def architecture(self) -> Architecture:  # looked up: functions of a table cannot be pickled
        return architecture(self.encoder.config.model_type)

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.encoder.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face configuration as plain values: what rebuilds this shape."""
        return self.encoder.config.to_dict()

    @property
    def hidden_size(self) -> int:
        return int(self.encoder.config.hidden_size)

    @property
    def classifier_dropout(self) -> float:
        """Dropout before a classifier, as the library's own classification heads have it."""
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
        return int(self.encoder.config.num_attention_heads)

    @property
    def pad_token_id(self) -> int:
        return int(self.encoder.config.pad_token_id or 0)

    @property
    def separator(self) -> int | None:
        """Id of the token behind the first of two texts, kept with the configuration."""
        return getattr(self.encoder.config, "sep_token_id", None)

    @separator.setter
    def separator(self, token: int | None) -> None:
        self.encoder.config.sep_token_id = token

    @property
    def longest_input(self) -> int:
        """Tokens that it takes at most."""
        return longest_input(self.config)

    def keep_layers(self, layers: list[int], flag: str) -> None:
        """Leave only these layers, from 1 (`architectures.keep_layers`)."""
        architectures.keep_layers(self.encoder, layers, flag)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """(B, S) ids and mask -> (B, S, H) states before layer 0, and the layers' context."""
        hidden_BSH = self.embeddings(input_ids, attention_mask, token_type_ids)
        return hidden_BSH, self.context(hidden_BSH, attention_mask)

    def embeddings(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, S) ids and mask -> (B, S, H) states before layer 0."""
        return self.architecture.embed(self.encoder, input_ids, attention_mask, token_type_ids)

    def context(self, hidden_BSH: Tensor, attention_mask_BS: Tensor) -> Any:
        """What the layers take besides the states; of these it reads the shape and type only."""
        return self.architecture.context(self.encoder, hidden_BSH, attention_mask_BS)

    def run_layer(self, index: int, hidden_BSH: Tensor, context: Any) -> Tensor:
        """Layer number `index`, from 0, on all tokens: (B, S, H) -> (B, S, H)."""
        after_BSH = self.architecture.run(self.layers[index], hidden_BSH, context)
        return self.architecture.after(self.encoder, index, hidden_BSH, after_BSH, context)

    def run_layer_for_first(self, index: int, hidden_BSH: Tensor, context: Any) -> Tensor:
        """What `run_layer` makes of the first token, for whoever reads no other: (B, S, H) ->
        (B, 1, H). About a third of its work, where layers can be run in parts; the same numbers but
        for rounding."""
        run = self.architecture.run_for_first
        if run is None:
            return self.run_layer(index, hidden_BSH, context)[:, :1]
        after_B1H = run(self.layers[index], hidden_BSH, context)
        return self.architecture.after(self.encoder, index, hidden_BSH[:, :1], after_B1H, context)

    def skip_layer(self, index: int, hidden_BSH: Tensor, context: Any) -> Tensor:
        """What `run_layer` gives if the layer does nothing: a norm after the last layer remains."""
        return self.architecture.after(self.encoder, index, hidden_BSH, hidden_BSH, context)

    @property
    def embedding_parts(self) -> EmbeddingParts:
        """What `embeddings` is made of, where layers can be split."""
        return architectures.embedding_parts(self.encoder)

    def parts(self, index: int) -> LayerParts | None:
        """What layer number `index` is made of, or None where it can only be run as a whole."""
        parts = self.architecture.parts
        return None if parts is None else parts(self.layers[index])


def from_config(config: Mapping[str, Any]) -> Backbone:
    """A backbone with random weights from the plain values of its configuration.

    Its own pooler, where it has one, is left out: each ramp has a pooler of its own.
    """
    with_pooler = {"add_pooling_layer": False} if architecture(config["model_type"]).pooler else {}
    return Backbone(AutoModel.from_config(AutoConfig.for_model(**config), **with_pooler))


def pretrained(spec: Mapping[str, Any]) -> tuple[Backbone, nn.Linear | None]:
    """The backbone that `conf/backbone/` names, with its pretrained weights.

    Returns:
        The backbone without a pooler, and the pretrained pooler's linear layer (H -> H) to start
        the ramps from, or None where there is none (DistilBERT, random weights).

    Raises:
        UserError: it cannot be loaded, or its weights are not the ones promised.
    """
    if "config" in spec:
        try:
            return from_config(random_config(spec)), None
        except UserError:
            raise
        except Exception as error:  # the library checks its sizes in many ways
            reason = first_line(error)
            raise UserError(f"backbone {spec['name']}: {reason} (backbone.config.*)") from error
    path = _locate(spec)
    config = _load(AutoConfig.from_pretrained, path, spec)
    architecture(config.model_type)  # refuse before anything is downloaded
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of unused heads frightens, to no purpose
    try:
        encoder = _load(AutoModel.from_pretrained, path, spec)
    finally:
        transformers.logging.set_verbosity(verbosity)
    pooler = None
    if architecture(config.model_type).pooler:
        pooler = encoder.pooler.dense
        encoder.pooler = None
    return Backbone(encoder), pooler


def tokenizer(spec: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone that `conf/backbone/` names."""
    if "config" in spec:
        return _character_tokenizer()
    return _load(AutoTokenizer.from_pretrained, _locate(spec), spec)


def random_config(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The full configuration of a randomly initialised backbone (`backbone=tiny`)."""
    architecture(spec["config"]["model_type"])
    tokens = _character_tokenizer()
    # All of them: the library warns of a type's own defaults that lie beyond this vocabulary.
    names = [f"{kind}_token_id" for kind in ("pad", "bos", "eos", "cls", "sep")]
    special = {name: getattr(tokens, name) for name in names}
    return {"vocab_size": len(tokens), **special, **spec["config"]}


def _character_tokenizer() -> PreTrainedTokenizerBase:
    characters = [*ascii_lowercase, *digits, *punctuation]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *characters, *(f"##{character}" for character in characters)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def _locate(spec: Mapping[str, Any]) -> str:
    """The packaged copy where it is installed (checked against its sha256), else path or hub id."""
    package = spec.get("package")
    if not package or Path(spec["path"]).is_dir():  # a folder of the user's goes first
        return str(spec["path"])
    name, _, inside = str(package).partition("/")
    found = importlib.util.find_spec(name)  # finds a top-level package without importing it
    if found is None or not found.submodule_search_locations:
        return str(spec["path"])
    folder = Path(found.submodule_search_locations[0]) / inside
    with open(folder / "model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != spec["sha256"]:
        raise UserError(
            f"backbone {spec['name']}: {folder / 'model.safetensors'} has sha256 {digest}, not "
            f"{spec['sha256']}: the package was changed; reinstall it or use another backbone="
        )
    return str(folder)


def _load(loader: Any, path: str, spec: Mapping[str, Any]) -> Any:
    try:
        return loader(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = first_line(error)
        raise UserError(
            f"backbone {spec['name']}: cannot load {path!r} ({reason}). Without a network use "
            "backbone=minilm (from the package installer) or backbone.path=a local folder"
        ) from error
