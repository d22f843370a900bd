import io
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from shards import decode, native
from shards.crop import Box, RandomCrop
from shards.damage import BadSample, Reason
from shards.decode import (
    Limits,
    decode_caption,
    decode_fields,
    decode_image,
    decode_square,
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


SMOOTH = SCENE.resize((120, 72), Image.Resampling.BICUBIC)
SEE_THROUGH = SMOOTH.convert("RGBA")
SEE_THROUGH.putalpha(SMOOTH.convert("L"))
RAMP = np.arange(0, 64000, 10, dtype=np.uint16).reshape(80, 80)
TURNED = Image.Exif()
TURNED[0x0112] = 6
STATED = Image.Exif()
STATED[0x010F] = "the maker of the camera"
KINDS = {
    "jpeg": lambda: encode(SMOOTH, "JPEG"),
    "jpeg, progressive": lambda: encode(SMOOTH, "JPEG", progressive=True),
    "jpeg, full colour": lambda: encode(SMOOTH, "JPEG", subsampling=0, quality=98),
    "jpeg, gray": lambda: encode(SMOOTH.convert("L"), "JPEG"),
    "jpeg, cmyk": lambda: encode(SMOOTH.convert("CMYK"), "JPEG"),
    "jpeg, turned": lambda: encode(SMOOTH, "JPEG", exif=TURNED),
    "jpegs in one": lambda: encode(SMOOTH, "MPO", save_all=True, append_images=[SCENE]),
    "png": lambda: encode(SMOOTH, "PNG"),
    "png, transparent": lambda: encode(SEE_THROUGH, "PNG"),
    "png, 16 bits": lambda: encode(Image.fromarray(RAMP), "PNG"),
    "png, palette": lambda: encode(SMOOTH.quantize(9), "PNG"),
    "png, turned": lambda: encode(SMOOTH, "PNG", exif=TURNED),
    "webp": lambda: encode(SMOOTH, "WEBP"),
    "webp, lossless": lambda: encode(SMOOTH, "WEBP", lossless=True),
    "webp, transparent": lambda: encode(SEE_THROUGH, "WEBP"),
    "webp, lossless, transparent": lambda: encode(SEE_THROUGH, "WEBP", lossless=True),
    "webp, with metadata": lambda: encode(SMOOTH, "WEBP", exif=STATED),
    "webp, moving": lambda: encode(SMOOTH, "WEBP", save_all=True, append_images=[SMOOTH.rotate(9)]),
    "webp, turned": lambda: encode(SMOOTH, "WEBP", exif=TURNED),
    "gif": lambda: encode(SMOOTH, "GIF"),
    "bmp": lambda: encode(SMOOTH, "BMP"),
}  # fmt: skip


@pytest.fixture
def unwatched(monkeypatch):
    """Decoders past their comparisons with Pillow."""
    decoders = native.NativeDecoders(checks=0)
    monkeypatch.setattr(decode, "NATIVE", decoders)
    return decoders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [24, 72, 100])
def test_a_decoded_square_is_the_picture_cut_and_resized(kind, channels, size, unwatched):
    data = KINDS[kind]()
    whole = decode_image(data, channels=channels)
    found = decode_square(data, size, channels=channels)
    assert found.shape == (channels, size, size)
    assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(fit_square(whole, size).copy()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_is_cut_out_of_the_upright_picture(kind, unwatched):
    data = KINDS[kind]()
    whole = decode_image(data)
    asked = []

    def crop(height, width):
        asked.append((height, width))
        return Box(3, 5, height - 20, width - 9)

    found = decode_square(data, 32, crop=crop)
    assert asked == [whole.shape[:2]]
    part = torch.from_numpy(whole[3:-17, 5:-4].copy()).permute(2, 0, 1)
    assert torch.equal(found, resize(part[None], 32)[0])


def test_a_mistake_of_the_crop_is_not_the_samples():
    def crop(height, width):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        decode_square(KINDS["png"](), 32, crop=crop)


@pytest.mark.parametrize(
    "kind",
    [
        "jpeg",
        "jpeg, progressive",
        "jpeg, gray",
        "jpegs in one",
        "webp",
        "webp, lossless, transparent",
    ],
)
def test_plain_pictures_do_without_pillow(kind):
    data = KINDS[kind]()
    opened = Image.open(io.BytesIO(data))

    def pillow():
        raise AssertionError("Pillow was asked")

    found = native.NativeDecoders(checks=0).decode(data, opened, pillow)
    assert (found == decode_image(data)).all()


def damaged(data, rng):
    """Data cut, with bits flipped, overwritten, with a part missing, or ended early."""
    data, place = bytearray(data), int(rng.integers(2, len(data)))
    match rng.integers(5):
        case 0:
            return bytes(data[:place])
        case 1:
            data[place] ^= 1 << int(rng.integers(8))
        case 2:
            for other in rng.integers(2, len(data), 9).tolist():
                data[other] = int(rng.integers(256))
        case 3:
            del data[place : place + 40]
        case 4:
            return bytes(data[:place]) + b"\xff\xd9"
    return bytes(data)


def outcome(call, data):
    """The picture, or what is wrong with it."""
    try:
        return call(data)
    except BadSample as bad:
        return bad.reason, bad.detail


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "turned" not in kind])
def test_damage_is_the_same_to_every_decoder(kind, unwatched):
    """Of damaged bytes comes the picture that Pillow makes of them, or one and the same reason."""
    data, rng = KINDS[kind](), np.random.default_rng(1)
    bad = 0
    for _ in range(150):
        broken = damaged(data, rng)
        expected = outcome(lambda broken: fit_square(decode_image(broken), 24), broken)
        found = outcome(lambda broken: decode_square(broken, 24).permute(1, 2, 0).numpy(), broken)
        assert np.array_equal(found, expected)
        bad += isinstance(found, tuple)
    assert bad >= 10


@pytest.mark.parametrize("kind", ["jpeg", "jpeg, progressive", "png", "webp", "gif", "bmp"])
@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_truncated_picture_is_bad(kind, fidelity, unwatched):
    data = KINDS[kind]()
    for share in (0.3, 0.6, 0.9):
        cut = data[: int(share * len(data))]
        assert reason_of(decode_square, cut, 8, fidelity=fidelity) == Reason.UNDECODABLE


def test_limits_hold_before_anything_is_decoded(unwatched):
    data = KINDS["jpeg"]()
    for limits, reason in (
        (Limits(image_bytes=10), Reason.TOO_MANY_BYTES),
        (Limits(pixels=100), Reason.TOO_MANY_PIXELS),
        (Limits(aspect=1.2), Reason.ABSURD_ASPECT),
    ):
        assert reason_of(decode_square, data, 24, limits=limits) == reason
    assert reason_of(decode_square, bomb(40_000, 40_000), 24) == Reason.TOO_MANY_PIXELS
    assert reason_of(decode_square, b"", 24) == Reason.EMPTY_IMAGE


def decibels(found, expected):
    """Peak signal over the root of the mean square difference."""
    return float(20 * torch.log10(255 / (found.float() - expected.float()).square().mean().sqrt()))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_read_at_a_reduced_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    large = SMOOTH.resize((1000, 600), Image.Resampling.BICUBIC)
    data = encode(large, "JPEG", quality=92, exif=exif)
    row = RandomCrop(0).draws(np.array([5]), np.array([0]))[0]
    drawn = RandomCrop(0).box(row, 600, 600)
    for box, least in ((Box(8, 8, 584, 592), 40), (drawn, 30)):  # the first needs no rounding

        def square(size, fidelity, box=box):
            return decode_square(data, size, crop=lambda *_: box, fidelity=fidelity)

        assert not torch.equal(square(64, "fast"), square(64, "exact"))
        assert decibels(square(64, "fast"), square(64, "exact")) > least
        assert torch.equal(square(150, "fast"), square(150, "exact"))


def watched(change):
    """Decoders whose JPEG pixels are changed, and what two pictures come out as."""
    decoders = native.NativeDecoders(checks=2)
    decoder = decoders._operators["JPEG"]
    decoders._operators["JPEG"] = lambda *arguments: change(decoder(*arguments))
    data = KINDS["jpeg"]()
    expected = decode_image(data)

    def found():
        return decoders.decode(data, Image.open(io.BytesIO(data)), lambda: expected)

    return decoders, found, expected


def test_a_decoder_equal_to_pillow_is_trusted_after_its_checks():
    decoders, found, expected = watched(lambda pixels: pixels)
    assert found() is expected
    assert found() is expected
    third = found()
    assert third is not expected
    assert (third == expected).all()
    assert decoders.states == {"JPEG": "torchvision"}


def one_spot(pixels):
    spot = torch.zeros_like(pixels)
    spot[0, 0, 0] = 1
    return pixels ^ spot


@pytest.mark.parametrize(
    "change", [lambda pixels: pixels ^ 1, lambda pixels: pixels.roll(1, 2), one_spot]
)
def test_a_decoder_that_differs_from_pillow_is_given_up(change):
    decoders, found, expected = watched(change)
    with pytest.warns(RuntimeWarning, match="JPEG pictures are decoded by Pillow from now on"):
        assert found() is expected
    assert found() is expected
    assert decoders.states["JPEG"].startswith("Pillow, as torchvision's differ by ")


def test_without_torchvisions_decoders_pillow_does_everything(monkeypatch):
    monkeypatch.setattr(native, "_OPERATORS", {"JPEG": "no_such_operator"})
    decoders = native.NativeDecoders()
    monkeypatch.setattr(decode, "NATIVE", decoders)
    assert decoders.states == {"JPEG": "Pillow, as torchvision has no decoder"}
    data = KINDS["jpeg"]()
    assert (
        decode_square(data, 72).permute(1, 2, 0).numpy() == fit_square(decode_image(data), 72)
    ).all()
