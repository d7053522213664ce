"""Pictures that people look at."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import atomic_write


def save_grid(path, images: np.ndarray, captions: list[str], columns: int = 10, clip_captions: bool = True):
    """Save uint8 images [n, H, W, 3] as a PNG of rows of tiles, each under its caption. Small images are enlarged.

    clip_captions: shorten what is wider than its tile, rather than let it run on over the next.
    """
    n, height, width, _ = images.shape
    zoom = max(1, -(-48 // height))
    height, width, line, gap = height * zoom, width * zoom, 14, 4
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + line + gap)
        while clip_captions and draw.textlength(caption, font=font) > width:
            caption = caption[:-1]
        draw.text((left, top), caption, fill="black", font=font)
        grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (left, top + line))
    with atomic_write(Path(path)) as temporary:
        grid.save(temporary, format="PNG")
