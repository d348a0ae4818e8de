"""Where the model looks: attention of the last fusion, and Grad-CAM of the CNN branch."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusionreid import FusionReID
from fusionreid.dataloading.loader import TestLoader
from fusionreid.dataloading.records import Record
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation.extract import known_only
from fusionreid.kernels import ClassStream
from fusionreid.kernels.reference import class_attention_weights

BY_CNN, BY_TRANSFORMER = "CNN attends to Transformer", "Transformer attends to CNN"
GRAD_CAM = "Grad-CAM of the CNN"


@torch.no_grad()
def attention_maps(
    model: FusionReID, records: Sequence[Record], cameras: Sequence[int], cfg: Config, ranks: Ranks
) -> dict[str, Tensor]:
    """Return the attention (B, h, w) of the last fusion at each patch, mean over heads; none where nothing is fused.

    All ranks call it with the same records, because a sharded model computes in step.
    """
    fusions = model.htm.layers[-1].fusions if len(model.heads) > 1 else []
    if not len(fusions) or not records:
        return {}
    shares: list[Tensor] = []
    grids: list[torch.Size] = []

    def note_shares(_: nn.Module, __: tuple[Tensor, ...], stream: ClassStream) -> None:
        exact = ClassStream(*(part.float() if isinstance(part, Tensor) else part for part in stream))
        shares.append(class_attention_weights(exact).mean(2))

    def note_grid(_: nn.Module, __: tuple[Tensor, ...], feature_map: Tensor) -> None:
        grids.append(feature_map.shape[2:])

    hooks = [unit.attn.register_forward_hook(note_shares) for unit in fusions]
    hooks += [unit.register_forward_hook(note_grid) for unit in (model.cnn_lru, model.transformer_lru)]
    known = torch.tensor(list(cameras), dtype=torch.int64, device=ranks.device)
    model.eval()
    for batch in _loaded(records, cfg, ranks):
        with parallel.autocast(cfg.SOLVER.PRECISION, ranks.device):
            model(batch.images, known_only(batch.cameras, known))
    for hook in hooks:
        hook.remove()
    by_cnn, by_transformer = (share.cpu() for share in shares)  # in the order of the streams
    return {BY_CNN: by_cnn.unflatten(1, grids[1]), BY_TRANSFORMER: by_transformer.unflatten(1, grids[0])}


def grad_cam(
    model: FusionReID, records: Sequence[Record], matches: Sequence[Record], cfg: Config, ranks: Ranks
) -> dict[str, Tensor]:
    """Return where the CNN finds each image (B, h, w) like its match: Grad-CAM of the cosine of both CNN features.

    Nothing without a CNN branch, or without captum, which is optional.
    """
    cnn = model.cnn
    if cnn is None or not records or find_spec("captum") is None:
        return {}
    from captum.attr import LayerGradCam  # 1 s

    model.eval()
    (batch,) = _loaded([*records, *matches], cfg, ranks)
    images, match_images = batch.images.float().chunk(2)
    with torch.no_grad():
        concept = model.cnn_pool(cnn(match_images))

    def likeness(pixels: Tensor) -> Tensor:
        return F.cosine_similarity(model.cnn_pool(cnn(pixels)), concept)

    maps = LayerGradCam(likeness, cnn).attribute(images.requires_grad_(), relu_attributions=True)
    return {GRAD_CAM: maps[:, 0].detach().float().cpu()}


def _loaded(records: Sequence[Record], cfg: Config, ranks: Ranks) -> TestLoader:
    """One batch of all records, the same on all ranks."""
    here = cfg.DATALOADER.model_copy(update={"NUM_WORKERS": 0})  # a handful of images
    return TestLoader(records, cfg.INPUT, here, batch_size=len(records), device=ranks.device)
