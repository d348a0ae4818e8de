"""The further measures that TEST.DETAILS asks for, computed in shares of the queries by all ranks, on the device."""

from typing import Any

from torch import Tensor

from fusionreid.engine.distributed import parallel
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation.evaluator import rank_features
from fusionreid.engine.evaluation.measures import (
    Ids,
    camera_pairs,
    distance_blocks,
    operating_points,
    pool_queries,
    single_gallery_shot,
)
from fusionreid.engine.evaluation.retrieval import rows_of_share

FALSE_POSITIVE_RATES = 1e-4, 1e-3, 1e-2
SHOWN_RANKS = 1, 5, 10


def details(features: Tensor, num_query: int, ids: Ids, ranks: Ranks) -> dict[str, Any]:
    """Camera pairs, thresholds, single gallery shot and multi-query of features (Q + G, D), by name for metrics.json.

    Cameras are counted from 1. All ranks call it, and all get the same.
    """
    query, gallery = features[:num_query], features[num_query:]
    ids = ids[0].to(query.device), ids[1].to(query.device), ids[2].to(query.device), ids[3].to(query.device)
    pooled, persons, cameras = pool_queries(query, ids[0], ids[2])
    multi = rank_features(pooled, gallery, (persons, ids[1], cameras, ids[3]), ranks)
    pairs = camera_pairs(query, gallery, ids, lambda q, g, pair_ids: rank_features(q, g, pair_ids, ranks))
    unit_length = bool(((features.norm(dim=1) - 1).abs() < 1e-3).all())
    mine = rows_of_share(num_query, (ranks.rank, ranks.world_size))
    own_query, own_ids = query[mine], (ids[0][mine], ids[1], ids[2][mine], ids[3])
    points = operating_points(
        distance_blocks(own_query, gallery), own_ids, FALSE_POSITIVE_RATES, gather=parallel.gather_rows
    )
    shot = single_gallery_shot(distance_blocks(own_query, gallery), own_ids, gather=parallel.gather_rows)
    return {
        "camera_pairs": [{**p._asdict(), "query": p.query + 1, "gallery": p.gallery + 1} for p in pairs],
        "thresholds": [{**p._asdict(), **({"cosine": 1 - p.distance / 2} if unit_length else {})} for p in points],
        "single_gallery_shot": {f"Rank-{r}": shot[r - 1].item() for r in SHOWN_RANKS},
        "multi_query": {"queries": multi.num_valid, "mAP": multi.mAP, "Rank-1": multi.cmc[0].item()},
    }
