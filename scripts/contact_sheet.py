"""Contact sheets: rows of images with titles and labels."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def contact_sheet(rows: list[tuple[str, list[Tensor]]], titles: list[str], tile: int = 192) -> Image.Image:
    """Return one image: a labeled row per camera, a titled column per kind.

    Args:
        rows: label and (height width 3) images in [0, 1] of each row; all images have one size.
        titles: column titles.
        tile: height of each image on the sheet, in pixels.
    """
    gap, head = 6, 24
    margin = 64 if any(label for label, _ in rows) else 0
    font = ImageFont.load_default(size=14)
    height, width = rows[0][1][0].shape[:2]
    wide = math.ceil(tile * width / height)
    sheet = Image.new("RGB", (margin + len(titles) * (wide + gap), head + len(rows) * (tile + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = margin + column * (wide + gap)
        draw.text((left + wide // 2, head // 2), title, fill="black", font=font, anchor="mm")
        for line, (_, images) in enumerate(rows):
            picture = Image.fromarray((images[column].clamp(0, 1) * 255).round().byte().numpy())
            sheet.paste(picture.resize((wide, tile), Image.Resampling.BICUBIC), (left, head + line * (tile + gap)))
    for line, (label, _) in enumerate(rows):
        middle = head + line * (tile + gap) + tile // 2
        draw.text((margin // 2, middle), label, fill="black", font=font, anchor="mm")
    return sheet
