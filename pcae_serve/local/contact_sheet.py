"""Many small pictures in one: a glance at what a run over a folder saw."""

from PIL import Image, ImageDraw, ImageFont

#: Pictures on a sheet at most, those of a row, and the side of each in pixels.
MOST, ACROSS, SIDE = 100, 10, 112
GAP, LINE = 8, 14  # pixels between pictures, and of a line of text below
NARROWEST = 3  # pixels of a letter
BACK, INK = "white", "black"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


class ContactSheet:
    """The first MOST pictures of a run, each with lines of text below it."""

    def __init__(self) -> None:
        self._cells: list[tuple[Image.Image, tuple[str, ...]]] = []

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, picture: Image.Image, *lines: str) -> None:
        """Add a picture, unless the sheet is full."""
        if len(self._cells) < MOST:
            small = picture.copy()
            small.thumbnail((SIDE, SIDE))
            self._cells.append((small, lines))

    def draw(self) -> Image.Image:
        """Return the sheet: rows of up to ACROSS pictures, from the top left."""
        text = max((len(lines) for _, lines in self._cells), default=0)
        wide, high = SIDE + GAP, SIDE + GAP + text * LINE
        across = min(ACROSS, len(self._cells))
        down = -(-len(self._cells) // ACROSS)
        sheet = Image.new("RGB", (across * wide + GAP, down * high + GAP), BACK)
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
        for i, (picture, lines) in enumerate(self._cells):
            left, top = GAP + i % ACROSS * wide, GAP + i // ACROSS * high
            sheet.paste(picture, (left, top))
            for row, line in enumerate(lines):
                place = (left, top + SIDE + 1 + row * LINE)
                draw.text(place, _shortened(line, draw, font), INK, font)
        return sheet


def _shortened(line: str, draw: ImageDraw.ImageDraw, font: Font) -> str:
    """Return a line that fits below a picture; its middle is left out if it is too long."""
    line = line.replace("\n", " ")
    kept = min(len(line), SIDE // NARROWEST)
    while draw.textlength(shown := _middle_out(line, kept), font) > SIDE and kept > 1:
        kept -= 1
    return shown


def _middle_out(line: str, kept: int) -> str:
    if kept >= len(line):
        return line
    return f"{line[: -(-kept // 2)]}…{line[len(line) - kept // 2 :]}"
