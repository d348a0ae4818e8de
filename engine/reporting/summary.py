"""Results of an evaluation: the printed table, metrics.json with intervals and details, pictures and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusionreid.dataloading.records import Record, Split
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.measures import Ids, bootstrap
from fusionreid.engine.evaluation.retrieval import Ranking, top_k
from fusionreid.engine.reporting.attention import Maps, attention_sheet
from fusionreid.engine.reporting.rank_lists import SHOWN_QUERIES, choose_queries, rank_lists
from fusionreid.engine.reporting.run_record import Result
from fusionreid.engine.reporting.runs import ATTENTION, RANK_LISTS, SHOWN_RANKS, draw_report
from fusionreid.files import atomic_write
from fusionreid.sealed import unsealed, write_sealed


def write_results(output: Path, rankings: Mapping[str, Ranking], about: Mapping[str, Any]) -> None:
    """Print the table and write metrics.json: measures by name, and what they are about."""
    columns = "mAP", "mINP", *(f"Rank-{rank}" for rank in SHOWN_RANKS)
    print(f"{'%':18}{''.join(f'{column:>8}' for column in columns)}{'queries':>9}{'mAP, 95 % interval':>22}")
    results = {}
    for name, ranking in rankings.items():
        each = [ranking.average_precisions, ranking.inverse_penalties, (ranking.first_ranks == 1).double()]
        low, high = (limits.tolist() for limits in bootstrap(torch.stack(each, 1)))
        cmc, count = ranking.cmc.tolist(), ranking.num_valid
        result = Result(mAP=ranking.mAP, mINP=ranking.mINP, cmc=cmc, valid_queries=count)
        measures = result.mAP, result.mINP, *(result.rate_at(rank) for rank in SHOWN_RANKS)
        interval = f"{100 * low[0]:.1f} to {100 * high[0]:.1f}"
        print(f"{name:18}{''.join(f'{100 * value:8.1f}' for value in measures)}{count:9}{interval:>22}")
        results[name] = {
            **result.model_dump(),
            "interval_95": dict(zip(("mAP", "mINP", "Rank-1"), map(list, zip(low, high)))),
            "unmatched_queries": ranking.num_unmatched,
        }
    write_sealed(output / "metrics.json", {**about, "results": results})


def add_details(output: Path, details: Mapping[str, Any]) -> None:
    """Add what TEST.DETAILS asks for to metrics.json, and print the thresholds among it."""
    for point in details["thresholds"]:
        cosine, distance = point.get("cosine"), point["distance"] ** 0.5
        limit = f"distance at most {distance:.3f}" if cosine is None else f"cosine at least {cosine:.3f}"
        found, rarity = 100 * point["true_positive_rate"], 1 / point["false_positive_rate"]
        print(f"same person if {limit}: finds {found:.1f} % of the matches, accepts 1 in {rarity:,.0f} other pairs")
    results = unsealed((output / "metrics.json").read_bytes())  # written by this very process
    write_sealed(output / "metrics.json", {**results, **details})


def shown_queries(ranking: Ranking, query: Sequence[Record]) -> list[Record]:
    """Choose the queries that the pictures show."""
    return [query[i] for i in choose_queries(_precision(ranking), SHOWN_QUERIES)]


def _precision(ranking: Ranking) -> np.ndarray:
    """Return the average precision (Q,), NaN where a query has no match."""
    matched = ranking.num_matches.numpy() > 0
    precision = np.full(len(matched), np.nan)
    precision[matched] = ranking.average_precisions
    return precision


def write_report(cfg: Config, split: Split, features: Tensor, ids: Ids, ranking: Ranking, maps: Maps | None) -> None:
    """Write ranks.png and attention.png, then report.html; the rank lists are those of the ranking."""
    output, num_query = Path(cfg.OUTPUT_DIR), len(split.query)
    nearest = top_k(features[:num_query], features[num_query:], *ids, k=10, metric="euclidean")
    distances, neighbours = (tensor.cpu() for tensor in nearest)
    shown = 1 - distances / 2 if cfg.TEST.FEAT_NORM else distances.sqrt()  # the cosine at unit length, else a distance
    lists = rank_lists(split.query, split.gallery, neighbours.numpy(), shown.numpy(), _precision(ranking))
    _save(lists, output / RANK_LISTS)
    if maps is not None:
        _save(attention_sheet(shown_queries(ranking, split.query), maps), output / ATTENTION)
    else:
        (output / ATTENTION).unlink(missing_ok=True)  # of another model
    draw_report(output, cfg)


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as file:
        picture.save(file, "PNG", optimize=True)
