"""A contact sheet as a picture, for chats and slides: queries on the left, matches by person beside them."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.engine.evaluation.operating_point import Threshold

if TYPE_CHECKING:
    from fusionreid.engine.reporting.contact_sheet import Group, Row, Shown

CELL = (96, 192)  # width, height in pixels of an image
GAP, MARGIN, CAPTION, HEADING = 14, 28, 54, 26
COLUMNS = 10  # matches side by side
LINE, HEAD = 34, 62  # heights of the line of the threshold and of the title
FONTS = "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf"
INK, FAINT, RULE, WASH, ACCENT = "#1d2229", "#69707a", "#dfe2e6", "#f1f3f5", "#0b5cad"


class Placed(NamedTuple):
    """A match at a column, and the text above it where a person begins."""

    column: int
    shown: "Shown"
    heading: str


def draw(title: str, rows: "Sequence[Row]", threshold: Threshold | None) -> Image.Image:
    """Draw a title and rows, one below the other; at a threshold a dashed line parts the matches."""
    layouts = [(row, _lines(row.above), _lines(row.below)) for row in rows]
    width = 2 * MARGIN + (COLUMNS + 1) * (CELL[0] + GAP) + GAP
    heights = [_height(above) + _height(below) + (LINE if threshold else 0) for _, above, below in layouts]
    heights = [max(height, _height([[]])) + MARGIN for height in heights]
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + sum(heights)), "white")
    pen, left, y = _Pen(sheet), MARGIN + CELL[0] + 3 * GAP, MARGIN + HEAD
    pen.text((MARGIN, MARGIN - 4), title, INK, width - 2 * MARGIN)
    if threshold:
        pen.text((MARGIN, MARGIN + 16), f"The line is at {threshold.words}.", FAINT, width - 2 * MARGIN)
    pen.rule(y - MARGIN // 2, width)
    for (row, above, below), height in zip(layouts, heights):
        pen.tile(row.query, MARGIN, y + HEADING, row.query.person or "query")
        pen.text((MARGIN, y), "query", FAINT)
        bottom = pen.lines(above, left, y, threshold)
        if threshold:
            pen.limit(left, width - MARGIN, bottom, threshold)
            bottom += LINE
        pen.lines(below, left, bottom, threshold)
        y += height
        pen.rule(y - MARGIN // 2, width)
    return sheet


def _height(lines: Sequence[object]) -> int:
    return len(lines) * (HEADING + CELL[1] + CAPTION + GAP)


def _lines(groups: "Sequence[Group]") -> list[list[Placed]]:
    """Fill lines of COLUMNS; a person who does not fit into the rest of a line begins the next, if one is enough."""
    lines: list[list[Placed]] = []
    for group in groups:
        used = len(lines[-1]) if lines else COLUMNS
        if not lines or used + min(len(group.matches), COLUMNS) > COLUMNS:
            lines.append([])
        for number, match in enumerate(group.matches):
            if len(lines[-1]) == COLUMNS:
                lines.append([])
            lines[-1].append(Placed(len(lines[-1]), match, "" if number else group.person or ""))
    return lines


class _Pen:
    def __init__(self, sheet: Image.Image) -> None:
        self.sheet, self.pen = sheet, ImageDraw.Draw(sheet)
        self.font = _font()

    def text(self, place: tuple[int, int], text: str, colour: str, room: int = CELL[0]) -> None:
        """Write one line, cut to the room there is."""
        if self.pen.textlength(text, self.font) > room:
            while text and self.pen.textlength(f"{text}...", self.font) > room:
                text = text[:-1]
            text = f"{text}..."
        self.pen.text(place, text, colour, self.font)

    def tile(self, shown: "Shown", x: int, y: int, text: str, faded: bool = False) -> None:
        """Draw an image with its caption."""
        self.pen.rectangle((x, y, x + CELL[0] - 1, y + CELL[1] - 1), fill=WASH)
        if (picture := shown.thumbnail()) is None:
            self.text((x + 8, y + CELL[1] // 2), "not there", FAINT)
        else:
            picture.thumbnail(CELL)
            if faded:
                picture = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.45)
            self.sheet.paste(picture, (x + (CELL[0] - picture.width) // 2, y + (CELL[1] - picture.height) // 2))
        for number, (line, colour) in enumerate(_caption(shown, text)):
            self.text((x, y + CELL[1] + 4 + 16 * number), line, colour)

    def lines(self, lines: Sequence[Sequence[Placed]], left: int, y: int, threshold: Threshold | None) -> int:
        """Draw lines of matches, and return where they end."""
        for line in lines:
            starts = [placed.column for placed in line if placed.heading] + [len(line)]
            for placed in line:
                x = left + placed.column * (CELL[0] + GAP)
                if placed.heading:
                    end = next(column for column in starts if column > placed.column)
                    room = (end - placed.column) * (CELL[0] + GAP) - GAP
                    self.text((x, y), placed.heading, INK, room)
                    self.pen.line((x, y + HEADING - 6, x + room, y + HEADING - 6), RULE, 2)
                faded = threshold is not None and placed.shown.cosine < threshold.cosine
                self.tile(placed.shown, x, y + HEADING, cosine_text(placed.shown.cosine), faded)
            y += _height([line])
        return y

    def limit(self, left: int, right: int, y: int, threshold: Threshold) -> None:
        """Draw the line of the threshold."""
        text = cosine_text(threshold.cosine)
        self.text((left, y + LINE // 2 - 12), text, ACCENT)
        for x in range(left + int(self.pen.textlength(text, self.font)) + 12, right, 12):
            self.pen.line((x, y + LINE // 2 - 4, min(x + 6, right), y + LINE // 2 - 4), ACCENT, 2)

    def rule(self, y: int, width: int) -> None:
        """Draw the end of a row."""
        self.pen.line((MARGIN, y, width - MARGIN, y), RULE, 1)


def _font() -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """Return the first font of the system that has more letters than Pillow's own, or else that one."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, 13)
    return ImageFont.load_default(13)


def _caption(shown: "Shown", text: str) -> Iterator[tuple[str, str]]:
    yield text, INK
    images = f"{shown.images} image{'' if shown.images == 1 else 's'}" if shown.images else ""
    if about := ", ".join(filter(None, [shown.camera, images])):
        yield about, INK
    yield shown.name, FAINT
