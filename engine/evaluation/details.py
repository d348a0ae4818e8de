"""The further measures that TEST.DETAILS asks for, computed in shares of the queries by all ranks, on the device."""

from typing import Any

import torch
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
from fusionreid.engine.evaluation.pairs import count_pairs, describe_pairs, distance_range
from fusionreid.engine.evaluation.retrieval import rows_of_share, top_k

FALSE_POSITIVE_RATES = 1e-4, 1e-3, 1e-2
SHOWN_RANKS = 1, 5, 10


def details(features: Tensor, num_query: int, ids: Ids, ranks: Ranks) -> dict[str, Any]:
    """Camera pairs, thresholds, pairs, single gallery shot and multi-query of features (Q + G, D), for metrics.json.

    All ranks call it, and all get the same.
    """
    query, gallery = features[:num_query], features[num_query:]
    ids = ids[0].to(query.device), ids[1].to(query.device), ids[2].to(query.device), ids[3].to(query.device)
    pooled, persons, cameras = pool_queries(query, ids[0], ids[2])
    multi = rank_features(pooled, gallery, (persons, ids[1], cameras, ids[3]), ranks)
    by_cameras = camera_pairs(query, gallery, ids, lambda q, g, pair_ids: rank_features(q, g, pair_ids, ranks))
    unit_length = bool(((features.norm(dim=1) - 1).abs() < 1e-3).all())
    mine = rows_of_share(num_query, (ranks.rank, ranks.world_size))
    own_query, own_ids = query[mine], (ids[0][mine], ids[1], ids[2][mine], ids[3])
    points = operating_points(
        distance_blocks(own_query, gallery), own_ids, FALSE_POSITIVE_RATES, gather=parallel.gather_rows
    )
    low, high = distance_range(distance_blocks(own_query, gallery), own_ids, gather=parallel.gather_rows)
    counts = count_pairs(distance_blocks(own_query, gallery), own_ids, low, high, gather=parallel.gather_rows)
    shot = single_gallery_shot(distance_blocks(own_query, gallery), own_ids, gather=parallel.gather_rows)
    return {
        "camera_pairs": [pair._asdict() for pair in by_cameras],
        "thresholds": [{**p._asdict(), **({"cosine": 1 - p.distance / 2} if unit_length else {})} for p in points],
        "pairs": describe_pairs(counts, unit_length=unit_length),
        "single_gallery_shot": {f"Rank-{r}": shot[r - 1].item() for r in SHOWN_RANKS},
        "multi_query": {"queries": multi.num_valid, "mAP": multi.mAP, "Rank-1": multi.cmc[0].item()},
    }


def nearest_images(features: Tensor, num_query: int, ids: Ids, ranks: Ranks, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances and gallery indices (Q, k) of the images nearest to each query, on the CPU; -1 past the end.

    Images of the query's person by its own camera are left out. All ranks call it, and all get the same.
    """
    query, gallery = features[:num_query], features[num_query:]
    mine = rows_of_share(num_query, (ranks.rank, ranks.world_size))
    own_ids = ids[0][mine], ids[1], ids[2][mine], ids[3]
    distances, indices = torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
    if len(own_ids[0]):  # of many ranks some have no query
        distances, indices = top_k(query[mine], gallery, *own_ids, k=k, metric="euclidean")
    return parallel.gather_rows(distances.cpu().double()), parallel.gather_rows(indices.cpu())


def nearest_match(features: Tensor, num_query: int, ids: Ids, query: int) -> int:
    """Gallery index of the image of a query's person, by another camera, that is nearest to the query."""
    matches = ((ids[1] == ids[0][query]) & (ids[3] != ids[2][query])).nonzero().flatten()
    rows = features[num_query:][matches.to(features.device)]
    return int(matches[torch.linalg.vector_norm(rows - features[query], dim=1).argmin()])
