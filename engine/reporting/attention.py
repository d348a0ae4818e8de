"""Where the model looks: what the two class tokens attend to among the patches of the other branch."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fusionreid import FusionReID
from fusionreid.dataloading.loader import TestLoader
from fusionreid.dataloading.records import Record
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation.extract import known_only
from fusionreid.engine.reporting.rank_lists import FAINT, GAP, INK, MARGIN, THUMBNAIL
from fusionreid.kernels import ClassStream
from fusionreid.kernels.reference import class_attention_weights

DARKEST = 0.1  # share of the light that is left where nothing is attended to
LABEL = 170  # width of the column of labels in pixels
ROWS = "query", "CNN's class token over\nthe Transformer's patches", "Transformer's class token\nover the CNN's patches"

Maps = tuple[Tensor, Tensor]  # (B, h, w) each: of the CNN's class token, of the Transformer's


@torch.no_grad()
def attention_maps(
    model: FusionReID, records: Sequence[Record], cameras: Sequence[int], cfg: Config, ranks: Ranks
) -> Maps | None:
    """Return the attention of the last fusion at each patch, mean over heads; None where the model fuses nothing.

    All ranks call it with the same records, because a sharded model computes in step.
    """
    fusions = model.htm.layers[-1].fusions if len(model.heads) > 1 else []
    if not len(fusions) or not records:
        return None
    shares: list[Tensor] = []
    grids: list[torch.Size] = []

    def note_shares(_: nn.Module, __: tuple[Tensor, ...], stream: ClassStream) -> None:
        exact = ClassStream(*(part.float() if isinstance(part, Tensor) else part for part in stream))
        shares.append(class_attention_weights(exact).mean(2))

    def note_grid(_: nn.Module, __: tuple[Tensor, ...], feature_map: Tensor) -> None:
        grids.append(feature_map.shape[2:])

    hooks = [unit.attn.register_forward_hook(note_shares) for unit in fusions]
    hooks += [unit.register_forward_hook(note_grid) for unit in (model.cnn_lru, model.transformer_lru)]
    here = cfg.DATALOADER.model_copy(update={"NUM_WORKERS": 0})  # a handful of images
    images = TestLoader(records, cfg.INPUT, here, batch_size=len(records), device=ranks.device)
    known = torch.tensor(list(cameras), dtype=torch.int64, device=ranks.device)
    model.eval()
    for batch in images:
        with parallel.autocast(cfg.SOLVER.PRECISION, ranks.device):
            model(batch.images, known_only(batch.cameras, known))
    for hook in hooks:
        hook.remove()
    by_cnn, by_transformer = (share.cpu() for share in shares)  # in the order of the streams
    return by_cnn.unflatten(1, grids[1]), by_transformer.unflatten(1, grids[0])


def attention_sheet(records: Sequence[Record], maps: Maps) -> Image.Image:
    """Draw a column per image: as it is, then lit by either map, brightest where most is attended to."""
    width, height = THUMBNAIL[0] + GAP, THUMBNAIL[1] + GAP
    sheet = Image.new("RGB", (2 * MARGIN + LABEL + len(records) * width - GAP, 2 * MARGIN + 3 * height - GAP), "white")
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, label in enumerate(ROWS):
        pen.text((MARGIN, MARGIN + row * height), label, FAINT if row else INK, small)
    for column, record in enumerate(records):
        with Image.open(record.path) as file:
            image = file.convert("RGB").resize(THUMBNAIL, Image.Resampling.BICUBIC)
        x = MARGIN + LABEL + column * width
        lit = [image, *(_lit(image, attended[column].numpy()) for attended in maps)]
        for row, picture in enumerate(lit):
            sheet.paste(picture, (x, MARGIN + row * height))
    return sheet


def _lit(image: Image.Image, attended: np.ndarray) -> Image.Image:
    light = Image.fromarray(attended / attended.max()).resize(image.size, Image.Resampling.BILINEAR)
    factor = DARKEST + (1 - DARKEST) * np.asarray(light)[:, :, None]
    return Image.fromarray((np.asarray(image) * factor).round().astype(np.uint8))
