"""Which files are images, and how they become sRGB pixels of 8 bits."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import make_images
from PIL import Image

from evaluator import print_left_out
from features.images import MAX_PIXELS, describe_kinds, find_files, is_image, read_image

# The columns of the matrices from linear red, green and blue to XYZ, adapted to the white point of profiles (D50), from
# the ICC's profiles; and the power of the tone curve, or sRGB's formula.
SPACES = {
    "sRGB": ([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]], None),
    "Display P3": ([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]], None),
    "Adobe RGB": ([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]], 563 / 256),
    "linear sRGB": ([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]], 1.0),
}


def linear(values: np.ndarray, power: float | None) -> np.ndarray:
    """Decode values from 0 to 1."""
    srgb = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return srgb if power is None else values**power


def icc_profile(name: str, gray: bool = False) -> bytes:
    """Make an ICC profile (version 2) of a matrix and tone curves, or of a tone curve alone."""
    matrix, power = SPACES[name]
    curve = np.round(65535 * linear(np.linspace(0, 1, 1024), power)).astype(">u2")
    curve = b"curv" + struct.pack(">II", 0, len(curve)) + curve.tobytes()

    def point(xyz) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in xyz)

    tags = {b"desc": b"desc" + struct.pack(">II", 0, len(name) + 1) + name.encode() + bytes(79)}
    tags |= {b"wtpt": point((0.9642, 1.0, 0.8249)), b"cprt": b"text" + bytes(8)}
    channels = {} if gray else dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(point, np.transpose(matrix)), strict=True))
    tags |= channels | dict.fromkeys((b"kTRC",) if gray else (b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(data))
    header[8:24] = b"\x02\x10\0\0" + b"mntr" + (b"GRAY" if gray else b"RGB ") + b"XYZ "
    header[36:40], header[68:80] = b"acsp", struct.pack(">3i", 63190, 65536, 54061)
    return bytes(header) + table + data


def expected_srgb(pixels: np.ndarray, name: str) -> np.ndarray:
    """Convert pixels [..., 3] of a space to sRGB by its definition."""
    matrix, power = SPACES[name]
    mixed = linear(pixels / 255, power) @ (np.linalg.inv(SPACES["sRGB"][0]) @ matrix).T
    mixed = mixed.clip(0, 1)
    return 255 * np.where(mixed <= 0.0031308, 12.92 * mixed, 1.055 * mixed ** (1 / 2.4) - 0.055)


def stored(image: Image.Image, suffix: str, **options) -> io.BytesIO:
    """Return the file of an image, without loss."""
    file = io.BytesIO()
    image.save(file, suffix, **options | ({"lossless": True} if suffix == "WEBP" else {}))
    return file


@pytest.mark.parametrize("space", SPACES)
def test_colours_are_converted_to_srgb_with_their_profile(space):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    profile = icc_profile(space)
    converted = "colours converted to sRGB with their profile"
    results = []
    for suffix in ("PNG", "TIFF", "WEBP"):
        image, treatment = read_image(stored(Image.fromarray(pixels), suffix, icc_profile=profile))
        assert treatment == ([] if space == "sRGB" else [converted])
        results.append(np.asarray(image))
    assert all(np.array_equal(result, results[0]) for result in results)
    if space == "sRGB":
        assert np.array_equal(results[0], pixels), "pixels with a profile of sRGB are read as they are"
        return
    expected = expected_srgb(pixels, space)
    assert np.abs(results[0] - expected).max() < 2 and np.abs(pixels - expected).max() > 20
    # Palettes and pixels with transparency hold the same colours.
    few = Image.fromarray(pixels).quantize(4)
    colours = np.asarray(read_image(stored(few.convert("RGB"), "PNG", icc_profile=profile))[0])
    for other in (few, few.convert("RGBA")):
        assert np.array_equal(np.asarray(read_image(stored(other, "PNG", icc_profile=profile))[0]), colours)
    gray = np.asarray(read_image(stored(Image.fromarray(pixels), "PNG", icc_profile=profile), "L")[0])
    assert np.array_equal(gray, np.asarray(Image.fromarray(results[0]).convert("L")))


def test_profiles_of_grayscale_cmyk_and_of_other_pixels(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    profile = icc_profile("Adobe RGB", gray=True)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.astype(np.uint16) * 257)):
        result, treatment = read_image(stored(image, "PNG", icc_profile=profile))
        assert treatment == ["colours converted to sRGB with their profile"]
        expected = expected_srgb(np.repeat(pixels[..., None], 3, axis=-1), "Adobe RGB")
        assert np.abs(np.asarray(result) - expected).max() < 1.5 and np.abs(expected[..., 0] - pixels).max() > 5
    cases = {
        "colour profile of RGB not applied to pixels of L": (Image.fromarray(pixels), icc_profile("Display P3")),
        "colour profile of L not applied to pixels of RGB": (Image.new("RGB", (8, 8), "red"), profile),
        "colour profile of RGB not applied to pixels of CMYK": (Image.new("CMYK", (8, 8)), icc_profile("Adobe RGB")),
        "damaged or unknown colour profile not applied": (Image.new("RGB", (8, 8), "red"), b"Display P3"),
        "CMYK without a colour profile converted by a formula": (Image.new("CMYK", (8, 8)), b""),
    }
    for line, (image, profile) in cases.items():
        result, treatment = read_image(stored(image, "TIFF", icc_profile=profile))
        assert treatment == [line]
        assert np.array_equal(np.asarray(result), np.asarray(image.convert("RGB")))


def png(**chunks: bytes) -> io.BytesIO:
    """Return a PNG file of one pixel with additional chunks."""
    content = stored(Image.new("RGB", (1, 1)), "PNG").getvalue()
    added = b"".join(
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in chunks.items()
    )
    return io.BytesIO(content[:33] + added + content[33:])


def test_colours_that_are_recorded_without_a_profile_are_reported():
    def treatment(file) -> list[str]:
        return read_image(file)[1]

    # Three directories with one entry each: the tag, type, number and value. The first two hold the place of the next.
    entries = ((0x8769, 4, 1, struct.pack(">I", 26)), (0xA005, 4, 1, struct.pack(">I", 44)), (1, 2, 4, b"R03\0"))
    adobe = b"".join(struct.pack(">HHHI", 1, *entry[:3]) + entry[3] + bytes(4) for entry in entries)
    adobe = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + adobe
    reported = ["colours other than sRGB's, recorded without a profile, not applied"]
    gamma, chromaticity = struct.pack(">I", 45455), (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    assert treatment(png(gAMA=gamma, cHRM=struct.pack(">8I", *chromaticity))) == []
    assert treatment(png(gAMA=struct.pack(">I", 100000))) == reported
    assert treatment(png(sRGB=b"\0", gAMA=struct.pack(">I", 100000))) == []
    wide = (*chromaticity[:2], 68000, 32000, 26500, 69000, *chromaticity[6:])
    assert treatment(png(gAMA=gamma, cHRM=struct.pack(">8I", *wide))) == reported
    assert treatment(png(cICP=bytes([9, 16, 0, 1]))) == reported
    assert treatment(png(sRGB=b"\0", cICP=bytes([1, 13, 0, 1]))) == []
    assert treatment(stored(Image.new("RGB", (8, 8)), "JPEG", exif=adobe)) == reported


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_grayscale_tiff_files_of_12_and_16_bits(bits, white_is_zero):
    """Pillow leaves 12 bits unscaled, and does not invert 16 bits whose white is 0."""
    values = np.array([0, 1, 2], np.uint32) * (2**bits - 1) // 2
    packed = "".join(f"{value:012b}" for value in values) + "0" * 4
    data = values.astype("<u2").tobytes() if bits == 16 else int(packed, 2).to_bytes(5)
    entries = {
        256: 3,
        257: 1,
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 8,
        277: 1,
        278: 1,
        279: len(data),
    }
    start = 8 + len(data)
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    file = b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(entries)) + directory + bytes(4)
    image, treatment = read_image(io.BytesIO(file), "L")
    assert treatment == []
    assert np.asarray(image).tolist() == [[255, 128, 0] if white_is_zero else [0, 127, 255]]


def test_16_bits_are_rounded_to_8(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png")[0])
    assert pixels.shape == (256, 256, 3)
    assert np.abs(pixels[..., 0] - values / 257.0).max() <= 0.5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels(tmp_path):
    Image.new("L", (9, 12)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "L", max_pixels=108)[0].size == (9, 12)
    with pytest.raises(ValueError, match="9 x 12 pixels exceed the limit of 107"):
        read_image(tmp_path / "a.png", max_pixels=107)
    read_image(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_other_files_are_counted_by_kind(tmp_path, capsys):
    assert describe_kinds(["a.GIF", "b.gif", "c", "d.txt", "x.gif"]) == "3 .gif, 1 without suffix, 1 .txt"
    print_left_out(make_images(tmp_path))
    assert capsys.readouterr().err == ""
    (tmp_path / "class0/a.gif").touch()
    print_left_out(tmp_path)
    assert "files of other kinds are left out: 1 .gif" in capsys.readouterr().err
    (tmp_path / "__MACOSX/class0").mkdir(parents=True)
    for name in ("__MACOSX/class0/._0.png", "class1/._0.png"):
        (tmp_path / name).touch()
    print_left_out(tmp_path)
    assert f"are left out: 2, such as {tmp_path}/__MACOSX/class0/._0.png" in capsys.readouterr().err


def test_images_are_found_in_linked_folders_and_not_in_hidden_ones(tmp_path):
    tree = make_images(tmp_path / ".data/tree", classes=2, per_class=2)
    plain = [path.relative_to(tree) for path in find_files(tree).images]
    assert len(plain) == 4, "the folders above the data may be hidden"
    (tree / "class1").rename(tmp_path / "elsewhere")
    (tree / "class1").symlink_to(tmp_path / "elsewhere")
    (tree / ".trash").mkdir()
    (tree / ".trash/0.png").touch()
    found = find_files(tree)
    assert [path.relative_to(tree) for path in found.images] == plain
    assert (found.hidden, found.others) == ([tree / ".trash/0.png"], [])


def test_images_are_recognized_by_their_suffix():
    assert all(is_image(name) for name in ("a.png", "b.JPEG", "c.webp", "d.tiff", "e.bmp"))
    assert not any(is_image(name) for name in ("a.png.part", "png", "b.gif"))
