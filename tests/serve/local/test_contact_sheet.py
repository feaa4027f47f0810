"""Contact sheets: bounded, in order, with text that fits."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pcae_serve.local import contact_sheet
from pcae_serve.local.contact_sheet import GAP, MOST, SIDE, ContactSheet


def test_a_sheet_is_bounded_and_in_order() -> None:
    sheet = ContactSheet()
    for i in range(MOST + 5):
        sheet.add(Image.new("RGB", (448, 224), (i, 0, 0)), "a label", "a-very-long-name " * 20)
    assert len(sheet) == MOST
    drawn = np.asarray(sheet.draw())
    assert drawn.size < 10_000_000
    for i in (0, 1, 13, MOST - 1):
        row, column = divmod(i, contact_sheet.ACROSS)
        high = SIDE + GAP + 2 * contact_sheet.LINE
        assert tuple(drawn[GAP + 5 + row * high, GAP + 5 + column * (SIDE + GAP)]) == (i, 0, 0)


def test_long_text_keeps_both_ends() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    font = ImageFont.load_default(11)
    assert contact_sheet._shortened("bag.png", draw, font) == "bag.png"
    short = contact_sheet._shortened("IMG_20261127_081758_holiday_in_the_snow.jpeg", draw, font)
    assert short.startswith("IMG_")
    assert short.endswith(".jpeg")
    assert draw.textlength(short, font) <= SIDE
