"""Laws of the towers and of the dual encoder, over several architectures of each library."""

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_corpus import (
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

from align.encoders import build_image_tower, build_text_tower
from align.encoders.huggingface_text import HuggingFaceTextEncoder
from align.encoders.pooling import POOLERS, build_pooler
from align.encoders.timm_tower import TimmImageEncoder
from align.model import DualEncoder, DualEncoderConfig, Tower
from align.preprocess import preprocess
from shards.decode import decode_image, fit_square

IMAGE_TOWERS: dict[str, dict[str, Any]] = {
    "resnet10t": TINY_RESNET,
    "vit_tiny_patch16_224": TINY_VIT,
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
    },
    "mobilenetv3_small_050": {},  # widens what it pooled once more
}
DISTILBERT: dict[str, Any] = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
TEXT_TOWERS = {"bert": TINY_BERT, "roberta": TINY_BERT, "distilbert": DISTILBERT}
TEXTS = ["red circle", "blue", "a green cross and a black dot in a yellow ring", "purple frame"]
every_image_tower = pytest.mark.parametrize("name", IMAGE_TOWERS)
every_text_tower = pytest.mark.parametrize("name", TEXT_TOWERS)
every_pooler = pytest.mark.parametrize("pooler", POOLERS)


def image_tower(name: str) -> TimmImageEncoder:
    torch.manual_seed(0)
    return stirred(TimmImageEncoder(name, **IMAGE_TOWERS[name]))


def text_tower(name: str, pooler: str = "mean") -> HuggingFaceTextEncoder:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return stirred(
        HuggingFaceTextEncoder(
            name,
            pooler=pooler,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.backend.pad_token_id,
            **TEXT_TOWERS[name],
        )
    )


def stirred(tower):
    """Nothing zero, nothing alike: layers that start at zero would hide what comes before them."""
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tower.eval()


def images(rows: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)


@every_image_tower
def test_an_image_tower_has_the_width_it_declares(name):
    tower = image_tower(name)
    features = tower(images(3))
    assert features.pooled.shape == (3, tower.width)
    assert features.tokens.shape[0] == 3
    assert features.tokens.shape[2] == tower.token_width
    assert features.mask.shape == features.tokens.shape[:2]
    assert features.mask.all()


def test_a_picture_size_that_a_tower_does_not_take_is_told():
    image_tower("resnet10t").check_size(48)
    image_tower("vit_tiny_patch16_224").check_size(32)
    with pytest.raises(ValueError, match=r"does not take pictures of 48 px .*model.image_size"):
        image_tower("vit_tiny_patch16_224").check_size(48)


@every_text_tower
@every_pooler
def test_a_text_tower_has_the_width_it_declares(name, pooler):
    tower, batch = text_tower(name, pooler), tiny_tokenizer()(TEXTS)
    features = tower(batch.ids, batch.mask)
    assert features.pooled.shape == (len(TEXTS), tower.width)
    assert features.tokens.shape == (*batch.ids.shape, tower.width)
    assert torch.equal(features.mask, batch.mask)


@every_text_tower
@every_pooler
def test_a_text_depends_on_neither_neighbours_nor_padding(name, pooler):
    tower, tokenizer = text_tower(name, pooler), tiny_tokenizer()
    batch = tokenizer(TEXTS)
    assert not batch.mask.all(), "texts of one length would prove nothing"
    together = tower(batch.ids, batch.mask).pooled
    for row, text in enumerate(TEXTS):
        alone = tokenizer([text])
        pooled = tower(alone.ids, alone.mask).pooled
        torch.testing.assert_close(pooled[0], together[row], rtol=1e-5, atol=1e-6)
    assert tokenizer.backend.pad_token_id == 0
    wider = torch.nn.functional.pad(batch.ids, (0, 4), value=0)
    mask = torch.nn.functional.pad(batch.mask, (0, 4), value=False)
    torch.testing.assert_close(tower(wider, mask).pooled, together, rtol=1e-5, atol=1e-6)


@every_image_tower
def test_a_picture_depends_on_itself_alone(name):
    tower, batch = image_tower(name), images(4)
    together = tower(batch).pooled
    torch.testing.assert_close(tower(batch[2:3]).pooled[0], together[2], rtol=1e-4, atol=1e-5)
    batch[[0, 1, 3]] = 255 - batch[[0, 1, 3]]
    changed = tower(batch).pooled
    torch.testing.assert_close(changed[2], together[2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(changed[0], together[0])


@every_text_tower
def test_distinct_poolers_say_distinct_things(name):
    batch = tiny_tokenizer()(TEXTS)
    pooled = [text_tower(name, pooler)(batch.ids, batch.mask).pooled for pooler in POOLERS]
    for one, other in pairwise(pooled):
        assert not torch.allclose(one, other)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), pooler=st.sampled_from([*POOLERS])
)
def test_poolers_equal_the_pooling_of_the_unpadded_row(lengths, pooler):
    tokens = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(sum(lengths)))
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    tokens[~mask] = 1e6
    slow = {
        "mean": lambda row: row.mean(dim=0),
        "attention": lambda row: row.mean(dim=0),  # where it begins
        "max": lambda row: row.max(dim=0).values,
        "cls": lambda row: row[0],
        "last": lambda row: row[-1],
    }[pooler]
    expected = torch.stack([slow(tokens[i, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(build_pooler(pooler, 3)(tokens, mask), expected)


@every_image_tower
def test_every_weight_of_an_image_tower_gets_a_gradient(name):
    tower = image_tower(name).train()
    tower(images(4)).pooled.square().sum().backward()
    assert not [key for key, p in tower.named_parameters() if p.grad is None or not p.grad.any()]


@every_text_tower
@every_pooler
def test_every_weight_of_a_text_tower_gets_a_gradient(name, pooler):
    tower, batch = text_tower(name, pooler).train(), tiny_tokenizer()(TEXTS)
    tower(batch.ids, batch.mask).pooled.square().sum().backward()
    assert not [key for key, p in tower.named_parameters() if p.grad is None or not p.grad.any()]


def test_every_weight_of_the_model_gets_a_gradient_also_the_projections():
    model = tiny_model().train()
    tokens = model.tokenize(TEXTS)
    image, text = model(images(4), tokens.ids, tokens.mask)
    (image * text[[1, 2, 3, 0]]).sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_encoding_does_not_depend_on_the_batch_size(batch_size):
    model = tiny_model()
    pictures = [
        picture(colour, "ring", side=20 + 9 * i)
        for i, colour in enumerate(("red", "blue", "green", "black", "purple"))
    ]
    texts = [*TEXTS, "dot"]
    torch.testing.assert_close(
        model.encode_image(pictures, batch_size=batch_size),
        model.encode_image(pictures),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        model.encode_text(texts, batch_size=batch_size),
        model.encode_text(texts),
        rtol=1e-5,
        atol=1e-6,
    )


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


@pytest.mark.parametrize(
    ("spec", "options", "parts"),
    [
        ("timm:resnet10", {}, ["timm has no model 'resnet10'", "near:", "resnet10t"]),
        ("timm:resnet10t", {"no_such": 1}, ["timm:resnet10t does not take", "no_such"]),
        ("resnet10t", {}, ["'resnet10t'", "timm:"]),
        ("tim:resnet10t", {}, ["'tim:resnet10t'", "timm:"]),
    ],
)
def test_mistaken_image_towers_are_named(spec, options, parts):
    with pytest.raises(ValueError, match=r".") as caught:
        build_image_tower(spec, **options)
    for part in parts:
        assert part in one_line(caught)


@pytest.mark.parametrize(
    ("spec", "options", "parts"),
    [
        ("hf:brt", {}, ["hf:brt", "near:", "bert"]),
        ("hf:bert", {"hiden_size": 3}, ["no option 'hiden_size'", "near: hidden_size"]),
        ("hf:bert", {"pooler": "avg"}, ["unknown pooler 'avg'", "native, mean, max, cls, last"]),
        ("bert", {}, ["'bert'", "hf:"]),
    ],
)
def test_mistaken_text_towers_are_named(spec, options, parts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r".") as caught:
        build_text_tower(spec, **options)
    for part in parts:
        assert part in one_line(caught)


def test_a_context_longer_than_the_tower_is_refused():
    with pytest.raises(ValueError, match=r"context_length 25 is more than .*hf:bert.*24") as caught:
        tiny_model(context_length=25)
    one_line(caught)


@every_text_tower
def test_the_longest_context_that_is_accepted_can_be_encoded(name):
    longest = 0
    for length in range(18, 30):
        try:
            model = tiny_model(
                text=f"hf:{name}", text_options=TEXT_TOWERS[name], context_length=length
            )
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
