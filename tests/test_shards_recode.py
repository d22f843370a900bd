"""Pictures on their way into shards: sizes, encodings, what stays as it is."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards.damage import BadSample, Reason
from shards.decode import Limits, decode_image
from shards.packing.recode import Recode, recode


def encoded(size, form="PNG", *, mode="RGB", seed=0, **options):
    generator = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    # Nearly gray: colour is what JPEG is coarse with, and that is not what is tested here.
    gray = generator.integers(40, 200, (6, 8, 1), np.uint8)
    coarse = gray + generator.integers(0, 20, (6, 8, bands), np.uint8)
    picture = Image.fromarray(coarse.squeeze(), mode if mode != "P" else "L").convert(mode)
    sink = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(sink, form, **options)
    return sink.getvalue()


def opened(data):
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def run(data, **options):
    return recode(data, Recode(**options), limits=Limits())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_what_needs_no_change_keeps_its_bytes(form):
    data = encoded((40, 30), form)
    kept = {"JPEG": "jpeg", "WEBP": "webp", "PNG": "png"}.get(form)
    for options in ({}, {"resize": 30}, {"resize": 40, "side": "longer"}, {"encode": kept}):
        result = run(data, **options)
        assert result.data == data
        assert result.size == result.original == (40, 30)


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((400, 300), {"resize": 100}, (133, 100)),
        ((300, 400), {"resize": 100}, (100, 133)),
        ((400, 300), {"resize": 100, "side": "longer"}, (100, 75)),
        ((400, 300), {"resize": 301}, (400, 300)),
        ((400, 8), {"resize": 20, "side": "longer"}, (20, 1)),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_the_side_that_was_named_is_at_most_so_long(form, size, options, expected):
    result = run(encoded(size, form), **options)
    assert result.size == expected == opened(result.data).size
    assert result.original == size
    assert opened(result.data).format == form


def test_a_smaller_picture_is_the_antialiased_one():
    data = encoded((400, 300))
    result = opened(run(data, resize=50).data)
    plain = opened(data).resize(result.size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(result), np.asarray(plain))
    nearest = opened(data).resize(result.size, Image.Resampling.NEAREST)
    assert not np.array_equal(np.asarray(result), np.asarray(nearest))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("encode", ["jpeg", "webp", "png"])
def test_every_encoding_becomes_every_other(form, encode):
    data = encoded((64, 48), form)
    result = run(data, encode=encode, quality=95)
    assert opened(result.data).format == {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}[encode]
    assert result.extension == {"jpeg": "jpg"}.get(encode, encode)
    difference = decode_image(result.data).astype(int) - decode_image(data).astype(int)
    assert np.abs(difference).mean() < 4
    assert (difference == 0).all() or encode != "png"


def test_quality_is_that_of_the_encoder():
    data = encoded((64, 48))
    low, high = (len(run(data, encode="jpeg", quality=q).data) for q in (20, 95))
    assert low < high


@pytest.mark.parametrize("form", ["GIF", "BMP"])
def test_old_encodings_become_png_when_resized(form):
    result = run(encoded((64, 48), form), resize=24)
    assert result.extension == "png"
    assert opened(result.data).size == (32, 24)


def test_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded((80, 40), "JPEG", exif=exif)
    result = run(data, resize=20)
    assert result.original == (40, 80)
    assert result.size == (20, 40) == opened(result.data).size
    assert not opened(result.data).getexif()
    upright = Image.fromarray(decode_image(data)).resize((20, 40), Image.Resampling.BICUBIC)
    difference = np.asarray(upright).astype(int) - decode_image(result.data)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "I;16"])
def test_odd_pictures_are_resized_too(mode):
    form = {"CMYK": "JPEG"}.get(mode, "PNG")
    if mode == "I;16":
        sink = io.BytesIO()
        Image.fromarray(np.full((40, 60), 40_000, np.uint16)).save(sink, "PNG")
        data = sink.getvalue()
    else:
        data = encoded((60, 40), form, mode=mode)
    result = run(data, resize=10)
    assert decode_image(result.data).shape == (10, 15, 3)
    plain = Image.fromarray(decode_image(data)).resize((15, 10), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(plain).astype(int) - decode_image(result.data)).mean() < 4


def test_transparency_stays_where_it_can():
    data = encoded((60, 40), mode="RGBA")
    assert opened(run(data, resize=10).data).mode == "RGBA"
    assert opened(run(data, encode="webp").data).mode == "RGBA"
    flat = run(data, encode="jpeg", quality=100)
    difference = decode_image(flat.data).astype(int) - decode_image(data)  # laid onto white
    assert np.abs(difference).mean() < 3
    opaque = encoded((60, 40), "WEBP", lossless=True)
    assert opened(run(opaque, resize=10).data).mode == "RGB"


def test_a_colour_profile_stays():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded((60, 40), "JPEG", icc_profile=profile)
    assert opened(run(data, resize=10).data).info["icc_profile"] == profile
    assert opened(run(data, encode="webp").data).info["icc_profile"] == profile


def test_what_cannot_be_encoded_is_told():
    sink = io.BytesIO()
    Image.new("RGB", (20_000, 1000)).save(sink, "PNG")
    with pytest.raises(BadSample) as caught:
        run(sink.getvalue(), encode="webp")
    assert caught.value.reason == Reason.TOO_MANY_PIXELS
    with pytest.raises(BadSample, match="not a picture"):
        run(b"text", resize=10)


def test_equal_pictures_give_equal_bytes():
    for form in ("PNG", "JPEG", "WEBP"):
        data = encoded((64, 48), form)
        assert len({run(data, resize=20).data for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 0}, "resize=0 must be"),
        ({"side": "wider"}, "unknown side 'wider'; known: shorter, longer"),
        ({"encode": "jpg"}, "unknown encoding 'jpg'; known: jpeg, webp, png"),
        ({"quality": 101}, "quality=101 must lie in"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        Recode(**options)
