"""The towers of OpenCLIP's own models, image and text, with or without published weights.

A tower ends before OpenCLIP's last linear map: that one is the model's projection. Only where it is
part of the pooling (ModifiedResNet) or of an adapter of OpenCLIP's does it stay inside.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, CLIPTextCfg, CLIPVisionCfg
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from align.encoders.open_clip_source import build_model, find_source, one_line
from align.encoders.timm_tower import as_tokens, built_for, timm_groups
from align.encoders.tower import (
    Features,
    ImageTower,
    TextTower,
    Vocabulary,
    near,
    refuse_small,
)


def _section(config: dict[str, Any], key: str, kind: type, options: dict[str, Any]) -> Any:
    """One tower's part of a configuration, with options in place."""
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"OpenCLIP's towers have no option {unknown[0]!r}{near(unknown[0], known)}; "
            f"they have {', '.join(known)}"
        )
    return {**config[key], **options}


class OpenCLIPImageEncoder(ImageTower):
    """An image tower of OpenCLIP: ViT, ModifiedResNet, or its timm adapter.

    Args:
        name: one of `open_clip.list_models()`, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        pretrained: a tag of `open_clip.list_pretrained()`, a file, or True for a folder or hub id.
        mean: per channel, of pixel values in [0, 1]; OpenAI's unless given.
        std: likewise.
        image_size: side of the pictures, where it is built from scratch.
        config: OpenCLIP's whole configuration, as a bundle keeps it.
        options: fields of `open_clip.CLIPVisionCfg`, such as `patch_dropout`.

    Raises:
        ValueError: an unknown model or option, or weights that cannot be had.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | bool = False,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
        image_size: int | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        statistics: tuple[Iterable[float], ...] = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        source = find_source(name, pretrained) if config is None else None
        whole = deepcopy(dict(config or {})) if source is None else source.config
        if source is not None:
            statistics = (source.preprocess["mean"], source.preprocess["std"])
        if image_size and source is not None and source.weights is None:
            options = {"image_size": image_size, **options}
        whole["vision_cfg"] = _section(whole, "vision_cfg", CLIPVisionCfg, options)
        if source is not None and source.weights is not None:
            visual: Any = build_model(source).visual
        else:
            with one_line(f"open_clip:{name} could not be made"):
                visual = _build_vision_tower(
                    whole["embed_dim"], whole["vision_cfg"], whole.get("quick_gelu", False)
                )
        if getattr(visual, "pool_type", "tok") == "none":
            raise ValueError(
                f"open_clip:{name} does not pool its tokens to one vector: set pool_type to tok or "
                "avg, and attentional_pool to true or false"
            )
        super().__init__(
            statistics[0] if mean is None else mean, statistics[1] if std is None else std
        )
        self.name = f"open_clip:{name if source is None else source.title}"
        self.config = {
            key: whole[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in whole
        }
        self.config["vision_cfg"].pop("timm_model_pretrained", None)
        self.visual = visual
        self.width, self.token_width = _widths(visual, self.config)
        if isinstance(visual, TimmModel):
            self.picture_size = built_for(visual.trunk)
        else:
            self.picture_size = max(to_2tuple(visual.image_size))
            refuse_small(self.name, self.picture_size, getattr(visual, "patch_size", None))
        if isinstance(visual, VisionTransformer):
            visual.proj = None
            visual.output_tokens = True

    @property
    def body(self) -> nn.Module:
        """OpenCLIP's module."""
        return self.visual

    def recipe(self) -> dict[str, Any]:
        """Options that rebuild the tower without weights."""
        return {"config": self.config, **self.statistics}

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode normalised pixels."""
        match self.visual:
            case VisionTransformer():
                pooled, tokens = self.visual(pixels)
            case ModifiedResNet():
                grid = self.visual.stem(pixels)
                for layer in ("layer1", "layer2", "layer3", "layer4"):
                    grid = getattr(self.visual, layer)(grid)
                pooled, tokens = self.visual.attnpool(grid), grid.flatten(2).mT
            case _:
                features = self.visual.trunk.forward_features(pixels)
                pooled = self.visual.head(self.visual.trunk.forward_head(features))
                tokens = as_tokens(features, self.token_width)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(pooled, tokens, mask)

    def layer_groups(self) -> list[list[str]]:
        """Stem, blocks or stages, and what follows."""
        if isinstance(self.visual, TimmModel):
            head = [f"visual.head.{name}" for name, _ in self.visual.head.named_parameters()]
            return [*timm_groups(self.visual.trunk, "visual.trunk."), *([head] if head else [])]
        if not isinstance(self.visual, ModifiedResNet):
            return super().layer_groups()
        stages = ("layer1", "layer2", "layer3", "layer4", "attnpool")
        names = [name for name, _ in self.named_parameters()]
        groups = [[name for name in names if name.startswith(f"visual.{s}.")] for s in stages]
        taken = {name for group in groups for name in group}
        return [[name for name in names if name not in taken], *groups]

    def _checkpoint_gradients(self, enabled: bool) -> None:
        if isinstance(self.visual, ModifiedResNet):
            raise ValueError("ModifiedResNet keeps its activations")
        self.visual.set_grad_checkpointing(enabled)


def _widths(visual: Any, config: dict[str, Any]) -> tuple[int, int]:
    """Widths of the pooled vector, without the last linear map, and of the tokens."""
    match visual:
        case VisionTransformer():
            norm: Any = visual.ln_post
            return norm.normalized_shape[0], norm.normalized_shape[0]
        case ModifiedResNet():
            attention: Any = visual.attnpool
            return visual.output_dim, attention.k_proj.in_features
        case TimmModel():
            tokens: Any = visual.trunk.num_features
            pool = config["vision_cfg"].get("timm_pool", "avg")
            proj = config["vision_cfg"].get("timm_proj", "linear")
            if not pool and proj not in {"linear", "mlp"}:
                raise ValueError("OpenCLIP's towers of timm's need a timm_pool, such as avg")
            if proj == "none" and pool not in {"abs_attn", "rot_attn"}:
                return getattr(visual.trunk, "head_hidden_size", None) or tokens, tokens
            return config["embed_dim"], tokens
    raise ValueError(f"OpenCLIP's {type(visual).__name__} is an image tower not known here")


class OpenCLIPTextEncoder(TextTower):
    """The text transformer of OpenCLIP's models.

    Args:
        name: one of `open_clip.list_models()`, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        pretrained: a tag of `open_clip.list_pretrained()`, a file, or True for a folder or hub id.
        config: OpenCLIP's whole configuration, as a bundle keeps it.
        vocabulary: of the tokenizer, where the tower is built from scratch.
        options: fields of `open_clip.CLIPTextCfg`.

    Raises:
        ValueError: an unknown model or option, a model whose text tower is Hugging Face's (name it
            with `hf:`), or weights that cannot be had.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | bool = False,
        config: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        source = find_source(name, pretrained) if config is None else None
        whole = deepcopy(dict(config or {})) if source is None else source.config
        if hub := whole["text_cfg"].get("hf_model_name"):
            raise ValueError(f"the text tower of open_clip:{name} is Hugging Face's: hf:{hub}")
        if "multimodal_cfg" in whole:
            raise ValueError(f"open_clip:{name} writes captions (CoCa); only its image tower fits")
        if vocabulary is not None and config is None and not pretrained:
            options = {**_fitted(vocabulary, whole["text_cfg"]), **options}
        whole["text_cfg"] = _section(whole, "text_cfg", CLIPTextCfg, options)
        with one_line(f"open_clip:{name} could not be made"):
            text: Any = _build_text_tower(
                whole["embed_dim"], whole["text_cfg"], whole.get("quick_gelu", False)
            )
        if source is not None and source.weights is not None:
            with one_line(f"{source.weights} does not fit open_clip:{name}"):
                _copy_weights(build_model(source), text)
        assert isinstance(text, TextTransformer)
        text.text_projection = None
        text.output_tokens = True
        self.name = f"open_clip:{name if source is None else source.title}"
        self.config = {
            key: whole[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in whole
        }
        self.text = text
        self.width = self.token_width = text.width
        self.vocabulary_size = text.vocab_size
        self.max_length = text.context_length
        self.pad_id = text.pad_id
        self.end_id = self._end()
        if not self._hides_padding():
            self.fixed_length = text.context_length

    @property
    def body(self) -> nn.Module:
        """OpenCLIP's module."""
        return self.text.transformer

    def recipe(self) -> dict[str, Any]:
        """Options that rebuild the tower without weights."""
        return {"config": self.config}

    def _end(self) -> int | None:
        """The id that pooling looks for."""
        match self.text.pool_type:
            case "argmax":
                return self.vocabulary_size - 1
            case "eos":
                return self.text.eos_id
        return None

    def _hides_padding(self) -> bool:
        """Whether no real token sees what follows the end of a text."""
        causal = self.text.attn_mask is not None and self.text.cls_emb is None
        return causal and self.text.pool_type in {"argmax", "eos", "first"}

    def embed(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens embedding"]:
        """Rows of the embedding table."""
        return self.text.token_embedding(ids)

    def encode(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        embedded: Float[Tensor, "batch tokens embedding"] | None = None,
    ) -> Features:
        """Encode a batch as it is."""
        if self.fixed_length is not None:
            pooled, tokens = self.text(ids)
            return Features(pooled, tokens, mask)
        # As its own forward, with the causal mask cut to the length of the chunk.
        length = ids.shape[1]
        rows: Tensor = self.text.token_embedding(ids) if embedded is None else embedded
        dtype = self.text.transformer.get_cast_dtype()
        placed = rows.to(dtype) + self.text.positional_embedding[:length].to(dtype)
        assert self.text.attn_mask is not None
        hidden = self.text.transformer(placed, attn_mask=self.text.attn_mask[:length, :length])
        tokens = self.text.ln_final(hidden)
        pooled = text_global_pool(tokens, ids, self.text.pool_type, self.text.eos_id)
        return Features(pooled, tokens, mask)

    def _checkpoint_gradients(self, enabled: bool) -> None:
        self.text.set_grad_checkpointing(enabled)


def _fitted(vocabulary: Vocabulary, text_cfg: dict[str, Any]) -> dict[str, Any]:
    """What a text tower from scratch takes over from the tokenizer."""
    options = {"vocab_size": vocabulary.size, "pad_id": vocabulary.pad_id}
    looks_for_the_end = text_cfg.get("pool_type", "argmax") in {"argmax", "eos"}
    if looks_for_the_end and vocabulary.end_id not in {None, vocabulary.size - 1}:
        # CLIP's end is the greatest id of its vocabulary; in others it is looked for by its id.
        options |= {"pool_type": "eos", "eos_id": vocabulary.end_id}
    return options


def _copy_weights(model: Any, text: nn.Module) -> None:
    """The text half of an OpenCLIP model, which may hold it as `text.` or as parts of its own."""
    source = getattr(model, "text", model)
    wanted = dict(source.state_dict())
    text.load_state_dict({key: wanted[key] for key in text.state_dict()})
