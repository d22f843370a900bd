import io
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from shards.damage import BadSample, Reason
from shards.decode import (
    Limits,
    decode_caption,
    decode_fields,
    decode_image,
    fit_square,
    resize,
    sniff_extension,
)

RNG = np.random.default_rng(0)
SCENE = Image.fromarray(RNG.integers(0, 256, (12, 20, 3), np.uint8).repeat(4, 0).repeat(4, 1))


def encode(image, form, **options):
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def bomb(width, height):
    """A PNG of a few bytes whose header promises a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def reason_of(call, *args, **options):
    with pytest.raises(BadSample) as caught:
        call(*args, **options)
    return caught.value.reason


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "GIF", "BMP"])
def test_every_format_decodes_as_pillow_does(form):
    data = encode(SCENE, form)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (decode_image(data) == expected).all()
    assert (decode_image(data, channels=4)[..., :3] == expected).all()
    assert (decode_image(data, channels=4)[..., 3] == 255).all()
    assert sniff_extension(data) == {"JPEG": "jpg"}.get(form, form.lower())


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_colour_models_become_rgb(mode):
    image = SCENE.convert("L") if mode == "LA" else SCENE
    form = "TIFF" if mode == "CMYK" else "PNG"
    image = image.convert(mode)
    data = encode(image, "JPEG", quality=95) if form == "TIFF" else encode(image, form)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for channels in (3, 4):
        assert (decode_image(data, channels=channels)[..., :3] == expected).all()


def test_16_bits_of_gray_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = decode_image(encode(Image.fromarray(ramp), "PNG"))
    assert (pixels[..., 0] == ramp >> 8).all()


def test_transparency_lies_on_white_or_is_kept():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, np.arange(16).reshape(4, 4) * 17
    for form in ("PNG", "WEBP"):
        data = encode(
            Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {})
        )
        alpha = pixels[..., 3:] / 255
        expected = 255 - alpha * (255 - np.array([200, 0, 0]))
        visible = pixels[..., 3] > 0
        assert np.abs(decode_image(data) - expected).max() <= 1
        assert (decode_image(data, channels=4)[visible] == pixels[visible]).all()


def test_a_palette_with_transparency_lies_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    pixels = decode_image(encode(image, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    upright = np.asarray(SCENE)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "PNG", exif=exif)
    assert (decode_image(data) == upright).all()


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP"):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:])
        assert decode_image(data)[0, 0, 0] > 200


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_IMAGE),
        (b"no picture at all", Reason.UNDECODABLE),
        (encode(SCENE, "PNG")[:200], Reason.UNDECODABLE),
        (encode(SCENE, "JPEG")[:300], Reason.UNDECODABLE),
        (encode(SCENE, "WEBP")[:100], Reason.UNDECODABLE),
        (encode(SCENE, "TIFF"), Reason.UNDECODABLE),
        (bomb(9000, 9000), Reason.TOO_MANY_PIXELS),
        (bomb(40_000, 40_000), Reason.TOO_MANY_PIXELS),
        (bomb(10_000, 10_000), Reason.TOO_MANY_PIXELS),
        (bomb(100, 100), Reason.UNDECODABLE),
        (encode(Image.new("RGB", (300, 2)), "PNG"), Reason.ABSURD_ASPECT),
    ],
)
def test_what_is_no_usable_picture_has_a_reason(data, reason):
    assert reason_of(decode_image, data) == reason


def test_the_limits_are_the_callers():
    data = encode(SCENE, "PNG")
    assert reason_of(decode_image, data, limits=Limits(image_bytes=10)) == Reason.TOO_MANY_BYTES
    assert reason_of(decode_image, data, limits=Limits(pixels=100)) == Reason.TOO_MANY_PIXELS
    assert reason_of(decode_image, data, limits=Limits(aspect=1.2)) == Reason.ABSURD_ASPECT


def test_captions_are_normalised():
    decomposed = unicodedata.normalize("NFD", "  café\n")
    assert decode_caption(decomposed.encode()) == "café"
    assert decode_caption(b"\xef\xbb\xbfafter a byte order mark") == "after a byte order mark"


@pytest.mark.parametrize(
    ("call", "data", "reason"),
    [
        (decode_caption, b"", Reason.EMPTY_CAPTION),
        (decode_caption, " \n\u00a0".encode(), Reason.EMPTY_CAPTION),
        (decode_caption, b"\xff\xfe", Reason.BAD_TEXT),
        (decode_caption, b"a" * 1_000_000, Reason.TOO_MANY_BYTES),
        (decode_fields, b"{", Reason.BAD_JSON),
        (decode_fields, b"", Reason.BAD_JSON),
        (decode_fields, b"[1]", Reason.BAD_JSON),
        (decode_fields, b"[" * 100_000, Reason.BAD_JSON),
        (decode_fields, b'{"a": "\xff"}', Reason.BAD_TEXT),
        (decode_fields, b" " * 2_000_000, Reason.TOO_MANY_BYTES),
    ],
)
def test_what_is_no_usable_text_has_a_reason(call, data, reason):
    assert reason_of(call, data) == reason


def test_the_central_square_is_cut_and_resized_like_pillow_does():
    pixels = np.asarray(SCENE)
    found = fit_square(pixels, 24)
    crop = SCENE.crop((16, 0, 64, 48))
    expected = np.asarray(crop.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert fit_square(found, 24) is found
    assert (fit_square(pixels, 48) == np.asarray(crop)).all()


def test_hidden_colours_do_not_bleed_into_visible_ones():
    stack = torch.zeros(1, 4, 16, 16, dtype=torch.uint8)
    stack[:, 0] = 255  # red everywhere ...
    stack[:, 1, :, :8] = 255  # ... and green where nothing is visible
    stack[:, 3, :, 8:] = 255
    small = resize(stack, 4)
    visible = small[:, 3] > 8
    assert small[:, 0][visible].min() > 250
    assert small[:, 1][visible].max() < 8
