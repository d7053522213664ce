"""Which files are images, and how they become pixels of 8 bits."""

import numpy as np
import pytest
from conftest import make_images
from PIL import Image

from evaluator import print_left_out
from features.images import MAX_PIXELS, describe_kinds, find_files, is_image, read_image


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
