"""Laws of the dual encoder and of what it is made of: poolers, projections, preprocessing."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import (
    COLOURS,
    TINY_BERT,
    TINY_RESNET,
    TINY_VIT,
    encoded,
    picture,
    random_pixels,
    tiny_model,
    tiny_tokenizer,
)
from PIL import Image

from align.encoders.pooling import POOLERS, build_pooler
from align.encoders.timm_tower import TimmImageEncoder
from align.model import PROJECTIONS, DualEncoder, DualEncoderConfig, Tower
from align.preprocess import FITS, preprocess
from shards.decode import decode_image, fit_square

DISTILBERT: dict[str, Any] = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
HF_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
HF_VIT: dict[str, Any] = {**HF_TEXT, "image_size": 32, "patch_size": 16}
TEXTS = ["red circle", "blue", "a green cross and a black dot in a yellow ring", "purple frame"]


def images(rows: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)


def test_a_picture_size_that_a_tower_does_not_take_is_told():
    TimmImageEncoder("resnet10t", **TINY_RESNET).check_size(48)
    tower = TimmImageEncoder("vit_tiny_patch16_224", **TINY_VIT).train()
    tower.check_size(32)
    with pytest.raises(ValueError, match=r"does not take pictures of 48 px .*model.image_size"):
        tower.check_size(48)
    assert tower.training, "a look leaves the tower as it was"


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), pooler=st.sampled_from([*POOLERS])
)
def test_poolers_equal_the_pooling_of_the_unpadded_row(lengths, pooler):
    tokens = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(sum(lengths)))
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    tokens[~mask] = float("nan")
    slow = {
        "mean": lambda row: row.mean(dim=0),
        "attention": lambda row: row.mean(dim=0),  # where it begins
        "max": lambda row: row.max(dim=0).values,
        "cls": lambda row: row[0],
        "last": lambda row: row[-1],
    }[pooler]
    expected = torch.stack([slow(tokens[i, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(build_pooler(pooler, 3)(tokens, mask), expected)


def test_pixels_are_normalised_with_the_backbones_own_statistics_or_with_those_given():
    seen = []

    def spy(tower):
        original = tower.backbone.forward_features
        tower.backbone.forward_features = lambda pixels: seen.append(pixels) or original(pixels)
        return tower

    batch = images(2)
    own = spy(TimmImageEncoder("resnet10t", **TINY_RESNET))
    own(batch)
    given_ = spy(
        TimmImageEncoder("resnet10t", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], **TINY_RESNET)
    )
    given_(batch)
    cfg = own.backbone.default_cfg
    for found, mean, std in zip(
        seen, (cfg["mean"], [0.1, 0.2, 0.3]), (cfg["std"], [0.5, 0.6, 0.7]), strict=True
    ):
        shape = (1, 3, 1, 1)
        expected = (batch.double() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(
            shape
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_have_unit_length_and_evaluation_is_deterministic():
    model = tiny_model(text_options={**TINY_BERT, "hidden_dropout_prob": 0.5}).train()
    pictures = [picture("red", "cross"), picture("blue", "dot", side=50)]
    encoders: list[tuple[Any, Any]] = [(model.encode_image, pictures), (model.encode_text, TEXTS)]
    for encode, given_ in encoders:
        rows = encode(given_)
        assert rows.dtype == torch.float32
        assert rows.shape == (len(given_), 16)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(given_)))
        assert torch.equal(encode(given_), rows)
        assert not rows.requires_grad
    assert model.training, "encoding leaves the model as it was"


PAIRS: dict[str, dict[str, Any]] = {
    "resnet and bert": {},
    "open_clip": {
        "image": "open_clip:ViT-B-32",
        "image_options": {"layers": 1, "width": 64, "patch_size": 16},
        "text": "open_clip:ViT-B-32",
        "text_options": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    },
    "vit and gpt2": {
        "image": "timm:vit_tiny_patch16_224",
        "image_options": {**TINY_VIT, "pooling": "attention"},
        "text": "hf:gpt2",
        "text_options": {"n_embd": 32, "n_layer": 1, "n_head": 2, "pooler": "last"},
    },
    "clip and siglip": {
        "image": "hf:clip_vision_model",
        "image_options": {**HF_VIT, "num_hidden_layers": 1},
        "text": "hf:siglip_text_model",
        "text_options": {**HF_TEXT, "max_position_embeddings": 16, "pooler": "native"},
    },
}


@pytest.mark.parametrize("pair", PAIRS)
def test_encoding_depends_on_neither_batches_nor_chunks_nor_order(pair):
    model = tiny_model(**PAIRS[pair])
    pictures = [picture(colour, "ring", side=20 + 9 * i) for i, colour in enumerate(COLOURS)]
    texts = [*TEXTS, "dot", "", "red " * 30]
    images, rows = model.encode_image(pictures), model.encode_text(texts)
    assert not torch.allclose(rows[0], rows[1])
    for batch_size, chunks in ((1, 4), (2, 1), (3, 2), (5, 7)):
        model.text.chunks = chunks
        torch.testing.assert_close(model.encode_image(pictures, batch_size=batch_size), images)
        found = model.encode_text(texts, batch_size=batch_size)
        torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_image(pictures[::-1]).flip(0), images)
    torch.testing.assert_close(model.encode_text(texts[::-1]).flip(0), rows, rtol=1e-4, atol=1e-5)


PROJECTED: dict[str, Any] = {
    "linear": lambda p, x: x @ p["weight"].T,
    "affine": lambda p, x: x @ p["weight"].T + p["bias"],
    "mlp": lambda p, x: torch.nn.functional.gelu(x @ p["0.weight"].T) @ p["2.weight"].T,
    "none": lambda _, x: x,
}


def projecting(kind: str) -> DualEncoder:
    torch.manual_seed(0)
    config = DualEncoderConfig(
        image=Tower("timm:resnet10t", TINY_RESNET, kind),
        text=Tower("hf:bert", TINY_BERT, kind),
        dim=32 if kind == "none" else 12,
        image_size=32,
        context_length=16,
    )
    return DualEncoder(config, tiny_tokenizer())


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_projections_compute_their_formula_at_unit_length(kind):
    model = projecting(kind)
    pooled = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for project, part in (
        (model.project_image, model.image_projection),
        (model.project_text, model.text_projection),
    ):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.1)
            expected = PROJECTED[kind](dict(part.named_parameters()), pooled)
            found = project(pooled)
        torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    sizes = {"linear": 32 * 12, "affine": 32 * 12 + 12, "mlp": 32 * 22 + 22 * 12, "none": 0}
    assert sum(p.numel() for p in model.text_projection.parameters()) == sizes[kind]


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_every_weight_of_the_model_gets_a_gradient_whatever_the_projection(kind):
    model = projecting(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.train()
    tokens = model.tokenize(TEXTS)
    image, text = model(images(4), tokens.ids, tokens.mask)
    assert image.shape == text.shape == (4, model.config.dim)
    (image * text[[1, 2, 3, 0]]).sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_logits_are_scaled_and_shifted_similarities():
    model = tiny_model()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    model.logit_scale.fill_(1.5)
    model.logit_bias.fill_(-3.0)
    image, text = model.encode_image(images(3)), model.encode_text(TEXTS)
    found = model.logits(image, text)
    for row in range(3):
        for column in range(4):
            cosine = (image[row].double() * text[column].double()).sum().item()
            assert found[row, column].item() == pytest.approx(math.exp(1.5) * cosine - 3, abs=1e-4)
    assert {"logit_scale", "logit_bias"} <= model.state_dict().keys()
    assert not {"logit_scale", "logit_bias"} & dict(model.named_parameters()).keys()


def test_what_is_frozen_stays_in_evaluation_while_the_rest_trains():
    model = tiny_model(text_options={**TINY_BERT, "hidden_dropout_prob": 0.5})
    model.image.requires_grad_(False)
    model.train()
    assert not any(part.training for part in model.image.modules())
    assert all(part.training for part in model.text.modules())
    before = {key: value.clone() for key, value in model.image.state_dict().items()}
    tokens = model.tokenize(TEXTS)
    first = model(images(4), tokens.ids, tokens.mask)
    again = model(images(4), tokens.ids, tokens.mask)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], again[1])
    for key, value in model.image.state_dict().items():
        assert torch.equal(value, before[key]), "statistics of frozen norms stand still"
    model.image.requires_grad_(True)
    assert all(part.training for part in model.train().modules())
    assert not any(part.training for part in model.eval().modules())


@pytest.mark.parametrize("fit", FITS)
def test_pictures_become_square_as_the_model_says(fit):
    made = tiny_model()
    model = DualEncoder(replace(made.config, fit=fit), made.tokenizer)
    wide = Image.fromarray(random_pixels(32, 64, 3))
    cut = wide.crop((16, 0, 48, 32)) if fit == "crop" else wide
    expected = preprocess(cut, 32, fit="squash")
    assert torch.equal(model.preprocess([wide])[0], expected)
    torch.testing.assert_close(model.encode_image([wide]), model.encode_image(expected[None]))


def test_mistakes_in_using_a_model_are_told_in_one_line():
    model = tiny_model()
    for mistaken, said in (
        (
            lambda: model.encode_image(images(2)[:, :1]),
            r"\[rows, 3, 32, 32\], not \[2, 1, 32, 32\]",
        ),
        (lambda: model.encode_image(images(2)[..., :16]), r"not \[2, 3, 32, 16\]"),
        (lambda: model.encode_image(images(2)[0]), r"not \[3, 32, 32\]"),
        (lambda: model.encode_image(images(2), batch_size=0), "batch_size=0"),
        (lambda: model.encode_text(TEXTS, batch_size=-1), "batch_size=-1"),
        (lambda: DualEncoder(replace(model.config, fit="pad"), model.tokenizer), "crop, squash"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            mistaken()
        one_line(caught)


def test_pictures_and_their_tensors_encode_alike():
    model = tiny_model()
    pictures = [picture("red", "cross"), picture("blue", "dot", side=50)]
    tensor = model.preprocess(pictures)
    assert torch.equal(model.encode_image(tensor), model.encode_image(pictures))


def test_files_of_pictures_encode_as_the_pictures_do(tmp_path):
    model, image = tiny_model(), picture("red", "cross", side=50)
    image.save(tmp_path / "cross.png")
    found = model.encode_image([tmp_path / "cross.png", str(tmp_path / "cross.png"), image])
    assert torch.equal(found, model.encode_image([image] * 3))


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"words\.png cannot be read as a picture"):
        tiny_model().encode_image([tmp_path / "words.png"])
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        tiny_model().encode_image([tmp_path / "absent.png"])


def test_nothing_encodes_to_no_rows():
    model = tiny_model()
    assert model.encode_image([]).shape == (0, 16)
    assert model.encode_text([]).shape == (0, 16)


def test_one_string_is_not_a_list_of_strings():
    with pytest.raises(ValueError, match="takes a list of strings, not one string"):
        tiny_model().encode_text("red circle")


def rgba(height: int, width: int) -> Image.Image:
    return Image.fromarray(random_pixels(height, width, 4))


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(random_pixels(40, 56, 3)).quantize(32)
    image.info["transparency"] = 5
    return image


def turned(form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif.tobytes()}
    if form == "WEBP":
        options["lossless"] = True
    return encoded(Image.fromarray(random_pixels(30, 70, 3)), form, **options)


FILES = {
    "rgb": lambda: encoded(Image.fromarray(random_pixels(61, 40, 3))),
    "right size already": lambda: encoded(Image.fromarray(random_pixels(32, 32, 3))),
    "side right, too long": lambda: encoded(Image.fromarray(random_pixels(32, 57, 3))),
    "smaller": lambda: encoded(Image.fromarray(random_pixels(9, 14, 3))),
    "rgba": lambda: encoded(rgba(45, 64)),
    "rgba webp": lambda: encoded(rgba(45, 64), "WEBP", lossless=True),
    "jpeg": lambda: encoded(Image.fromarray(random_pixels(64, 90, 3)), "JPEG"),
    "cmyk jpeg": lambda: encoded(Image.fromarray(random_pixels(64, 90, 4), mode="CMYK"), "JPEG"),
    "gray": lambda: encoded(Image.fromarray(random_pixels(33, 48, 1)[..., 0])),
    "gray with alpha": lambda: encoded(rgba(40, 41).convert("LA")),
    "gray of 16 bits": lambda: encoded(
        Image.fromarray((random_pixels(40, 41, 1)[..., 0].astype("uint16") << 8) + 7)
    ),
    "bits": lambda: encoded(Image.fromarray(random_pixels(33, 48, 1)[..., 0]).convert("1")),
    "palette": lambda: encoded(Image.fromarray(random_pixels(33, 48, 3)).quantize(16)),
    "palette with transparency": lambda: encoded(palette_with_transparency(), transparency=5),
    "gif with transparency": lambda: encoded(palette_with_transparency(), "GIF", transparency=5),
    "rgb with a transparent colour": lambda: encoded(
        Image.fromarray(random_pixels(40, 40, 3) // 64 * 64), transparency=(64, 64, 64)
    ),
    **{f"jpeg turned {n}": lambda n=n: turned("JPEG", n) for n in range(1, 9)},
    "png turned 6": lambda: turned("PNG", 6),
    "webp turned 8": lambda: turned("WEBP", 8),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_picture_is_the_same_to_encode_image_as_to_the_loader(kind):
    data = FILES[kind]()
    loaded = torch.from_numpy(fit_square(decode_image(data), 32).copy()).permute(2, 0, 1)
    with Image.open(io.BytesIO(data)) as opened:
        found = preprocess(opened, 32)
    assert found.dtype == torch.uint8
    assert torch.equal(found, loaded)


def test_upright_means_upright():
    """Orientation 6: the right edge of the file is the bottom of the picture."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste((255, 0, 0), (24, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encoded(image, "PNG", exif=exif.tobytes()))) as opened:
        found = preprocess(opened, 32)
    assert found[:, 0, 16].tolist() == [255, 255, 255]
    assert found[:, 31, 16].tolist() == [255, 0, 0]


# --- mistakes: one clear line each ---


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_context_longer_than_the_tower_is_refused():
    with pytest.raises(ValueError, match=r"context_length 25 is more than .*hf:bert.*24") as caught:
        tiny_model(context_length=25)
    one_line(caught)


@pytest.mark.parametrize("cut", [15, 17, 24])
def test_a_tokenizer_that_cuts_elsewhere_than_the_model_is_refused(cut):
    """It would go unseen until the model is saved and loaded, or fail in the tower's positions."""
    says = rf"tokenizer cuts texts to {cut} tokens, .* context_length is 16: make them equal"
    with pytest.raises(ValueError, match=says) as caught:
        DualEncoder(tiny_model().config, tiny_tokenizer(context_length=cut))
    one_line(caught)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("hf:bert", TINY_BERT),
        ("hf:roberta", TINY_BERT),
        ("open_clip:ViT-B-32", {"context_length": 24, "width": 32, "heads": 2, "layers": 1}),
    ],
    ids=["bert", "roberta", "open_clip"],
)
def test_the_longest_context_that_is_accepted_can_be_encoded(text, options):
    longest = 0
    for length in range(18, 30):
        try:
            model = tiny_model(text=text, text_options=options, context_length=length)
        except ValueError:
            break
        longest = length
        assert model.encode_text(["red " * 60]).isfinite().all()
    assert 20 < longest <= 24


def test_a_tokenizer_larger_than_the_towers_table_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer has \d+ entries.*hf:bert embeds 8") as caught:
        tiny_model(text_options={**TINY_BERT, "vocab_size": 8})
    one_line(caught)


def test_the_configuration_survives_json():
    config = DualEncoderConfig(Tower("timm:a", {"b": [1]}), Tower("hf:c"), dim=3)
    assert DualEncoderConfig.from_dict(config.to_dict()) == config
    assert isinstance(tiny_model(), DualEncoder)
