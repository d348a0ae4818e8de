"""Rank lists as a picture: queries from the best to the worst, each with its nearest gallery images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fusionreid.dataloading.records import Record

THUMBNAIL = (80, 160)  # width, height in pixels
GAP, MARGIN, CAPTION, FRAME = 14, 24, 34, 4
SHOWN_QUERIES = 6
INK, FAINT, RIGHT, WRONG = "#1d2229", "#69707a", "#1a9850", "#d73027"


def choose_queries(average_precision: np.ndarray, rows: int) -> np.ndarray:
    """Choose up to `rows` queries, evenly spread from the best average precision to the worst; NaN (no match) never."""
    order = np.argsort(-average_precision, kind="stable")
    order = order[np.isfinite(average_precision[order])]
    return order[np.unique(np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(np.int64))]


def rank_lists(
    query: Sequence[Record],
    gallery: Sequence[Record],
    neighbours: np.ndarray,
    similarity: np.ndarray,
    average_precision: np.ndarray,
    *,
    rows: int = SHOWN_QUERIES,
    top: int = 10,
) -> Image.Image:
    """Draw a row per chosen query: the query, then its nearest gallery images, framed green (right) or red (wrong).

    neighbours and similarity are (Q, K), nearest first, indices into gallery and -1 past the end of the ranking;
    average_precision is (Q,) with NaN where a query has no match.
    """
    chosen, top = choose_queries(average_precision, rows), min(top, neighbours.shape[1])
    width, height = THUMBNAIL[0] + GAP, THUMBNAIL[1] + CAPTION + GAP
    sheet = Image.new("RGB", (2 * MARGIN + (top + 1) * width + GAP, 2 * MARGIN + len(chosen) * height + GAP), "white")
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def place(record: Record, x: int, y: int, frame: str, text: str) -> None:
        with Image.open(record.path) as file:
            sheet.paste(file.convert("RGB").resize(THUMBNAIL, Image.Resampling.BICUBIC), (x, y))
        outline = (x - FRAME, y - FRAME, x + THUMBNAIL[0] + FRAME - 1, y + THUMBNAIL[1] + FRAME - 1)
        pen.rounded_rectangle(outline, FRAME, outline=frame, width=FRAME)
        pen.text((x, y + THUMBNAIL[1] + 7), f"{record.person:04d}  cam {record.camera + 1}", INK, small)
        pen.text((x, y + THUMBNAIL[1] + 21), text, FAINT, small)

    pen.text((MARGIN, MARGIN - 12), "query", FAINT, small)
    pen.text((MARGIN + width + GAP, MARGIN - 12), "gallery, most similar first", FAINT, small)
    for row, i in enumerate(chosen):
        y = MARGIN + GAP + row * height
        place(query[i], MARGIN, y, INK, f"AP {100 * average_precision[i]:.1f} %")
        for column, (j, value) in enumerate(zip(neighbours[i, :top], similarity[i, :top])):
            if j >= 0:
                frame = RIGHT if gallery[j].person == query[i].person else WRONG
                place(gallery[j], MARGIN + GAP + (column + 1) * width, y, frame, f"{value:.3f}")
    return sheet
