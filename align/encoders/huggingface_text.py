"""Text towers from Hugging Face: any encoder, and causal models too, with a pooler of ours."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from align.encoders.huggingface import (
    build_model,
    checkpoint_gradients,
    configuration,
    plain,
    pools,
    title,
)
from align.encoders.pooling import NATIVE, build_pooler
from align.encoders.tower import Features, TextTower, Vocabulary


class HuggingFaceTextEncoder(TextTower):
    """A Hugging Face text encoder with a pooler that respects the mask.

    Args:
        name: an architecture to build from scratch (`bert`), or a hub id or local folder.
        pretrained: load the published weights; needs a hub id or folder.
        pooler: `mean`, `max`, `cls` (first token), `last` (last real token, for causal models),
            `attention` (a learned query), or `native` (the architecture's own, where it has one).
        attention: `auto` (fused where the architecture can), `sdpa` (fused), or `eager`, which is
            quicker for short texts on a CPU.
        config: the whole configuration, as a bundle keeps it; `name` is then only a name.
        vocabulary: of the tokenizer, where the tower is built from scratch.
        options: fields of the model's configuration (`hidden_size`, `num_hidden_layers`, ...).

    Raises:
        ValueError: an unknown architecture, pooler or option, or weights that cannot be read.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        pooler: str = "mean",
        attention: str = "auto",
        config: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        defaults: Mapping[str, Any] = {}
        if vocabulary is not None and config is None and not pretrained:
            defaults = _fitted(vocabulary)
        settings = configuration(
            name,
            "text",
            pretrained=pretrained,
            config=config,
            options=options,
            defaults=defaults,
        )
        if not hasattr(settings, "vocab_size"):
            raise ValueError(f"hf:{name} is no text tower: it has no vocabulary")
        if settings.model_type in _PADDING_LEAKS:
            raise ValueError(
                f"hf:{name} brings neighbouring tokens together, padding among them: a text's "
                "vector would depend on the other texts of its batch; choose another architecture"
            )
        width: int = settings.hidden_size
        own_pooler = None if pooler == NATIVE else build_pooler(pooler, width)
        self.config = plain(settings)  # before it is built: T5 changes what it is given
        self.transformer = build_model(
            name,
            settings,
            pretrained=pretrained,
            attention=attention,
            prune=partial(_prune, pooler=pooler, name=name),
        )
        self.pooler = own_pooler
        known_as = title(name, settings, pretrained=pretrained, given=config is not None)
        self.name = f"hf:{known_as}"
        self.own = {"pooler": pooler, "attention": attention}
        self.width = self.token_width = width
        if pooler == NATIVE:
            self.width = getattr(settings, "projection_size", None) or width
        self.vocabulary_size: int = settings.vocab_size
        self.pad_id: int | None = settings.pad_token_id
        self.pad_is_an_entry = any(
            part.padding_idx is not None
            for part in self.transformer.modules()
            if isinstance(part, nn.Embedding)
        )
        self.max_length = longest_text(self.transformer)
        if settings.model_type in _PADDING_COUNTS:
            self.fixed_length = settings.max_position_embeddings
        elif pooler == NATIVE and settings.model_type == "clip_text_model":
            # Its pooler looks for the end; 2 is a mistake of the first configurations, which
            # stands for the greatest id.
            end = settings.eos_token_id
            self.end_id = self.vocabulary_size - 1 if end == 2 else end

    @property
    def body(self) -> nn.Module:
        """The Hugging Face model."""
        return self.transformer

    def recipe(self) -> dict[str, Any]:
        """Options that rebuild the tower without weights."""
        return {"config": self.config, **self.own}

    def embed(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens embedding"] | None:
        """Rows of the embedding table, where the architecture takes them instead of ids."""
        if self.transformer.config.model_type not in _TAKE_EMBEDDINGS:
            return None
        return self.transformer.get_input_embeddings()(ids)

    def encode(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        embedded: Float[Tensor, "batch tokens embedding"] | None = None,
    ) -> Features:
        """Encode a batch as it is."""
        inputs: dict[str, Any] = self._cache
        if self.fixed_length is None:
            inputs["attention_mask"] = mask.long()
        if embedded is None:
            output = self.transformer(input_ids=ids, **inputs)
        else:
            output = self.transformer(inputs_embeds=embedded, **inputs)
        tokens = output.last_hidden_state
        if self.pooler is not None:
            return Features(self.pooler(tokens, mask), tokens, mask)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{self.name} has no pooler of its own; choose another pooler")
        return Features(pooled, tokens, mask)

    @property
    def _cache(self) -> dict[str, bool]:
        # Causal models would keep keys and values for a next token that never comes.
        return {"use_cache": False} if hasattr(self.transformer.config, "use_cache") else {}

    def _checkpoint_gradients(self, enabled: bool) -> None:
        checkpoint_gradients(self.transformer, enabled)


_TAKE_EMBEDDINGS = {
    *("bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"),
    *("t5", "mt5", "gpt2", "llama", "mistral", "qwen2", "qwen3"),
}
"""Architectures that do the same with the rows of their table as with ids, padded on the right."""
_PADDING_COUNTS = {"siglip_text_model", "siglip2_text_model"}
"""Architectures that attend to padding: it is part of what they were trained on."""
_PADDING_LEAKS = {"funnel"}
"""Architectures whose results depend on how far a text is padded, whatever its mask says."""


def _fitted(vocabulary: Vocabulary) -> dict[str, int | None]:
    """What a configuration has to say of a vocabulary, where it has such fields."""
    fitted: dict[str, int | None] = {
        "vocab_size": vocabulary.size,
        "pad_token_id": vocabulary.pad_id,
        # No tower reads where texts begin, and the default may be no entry.
        "bos_token_id": None,
        "cls_token_id": None,
        "sep_token_id": vocabulary.end_id,
    }
    if vocabulary.end_id is not None:  # CLIP's own pooler looks for some end
        fitted["eos_token_id"] = vocabulary.end_id
    return fitted


def _prune(transformer: Any, *, pooler: str, name: str) -> None:
    """Take away the architecture's own pooling where ours replaces it: it would stay untrained.

    Raises:
        ValueError: it is wanted, and there is none.
    """
    if pooler == NATIVE:
        if not pools(transformer):
            raise ValueError(f"hf:{name} has no pooler of its own; choose another pooler")
        return
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None
    if transformer.config.model_type in _PADDING_COUNTS:
        transformer.head = nn.Identity()


def longest_text(transformer: Any) -> int:
    """The longest text, in tokens; relative positions have no end."""
    settings = transformer.config
    longest: int = getattr(settings, "max_position_embeddings", None) or 1 << 30
    embeddings = getattr(transformer, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    # RoBERTa and its kin count positions from the padding id on.
    return longest if padding is None else longest - padding - 1
