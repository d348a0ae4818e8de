"""What an evaluation leaves: a table, metrics.json with intervals and details, and the report with rank lists."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.records import Record, Split
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.measures import Ids, bootstrap
from fusionreid.engine.evaluation.retrieval import Ranking, top_k
from fusionreid.engine.reporting.attention import Maps, attention_sheet
from fusionreid.engine.reporting.html import SHOWN_QUERIES, choose_queries, rank_lists
from fusionreid.engine.reporting.runs import ATTENTION, RANK_LISTS, draw_report
from fusionreid.files import write_json

SHOWN_RANKS = 1, 5, 10


def write_results(output: Path, rankings: Mapping[str, Ranking], about: Mapping[str, Any]) -> None:
    """Print the table and write metrics.json: measures by name, and what they are about."""
    print(
        f"{'%':18}{'mAP':>8}{'mINP':>8}{'Rank-1':>8}{'Rank-5':>8}{'Rank-10':>8}{'queries':>9}{'mAP, 95 % interval':>22}"
    )
    results = {}
    for name, ranking in rankings.items():
        each = [ranking.average_precisions, ranking.inverse_penalties, (ranking.first_ranks == 1).double()]
        low, high = (limits.tolist() for limits in bootstrap(torch.stack(each, 1)))
        measures = ranking.mAP, ranking.mINP, *ranking.cmc[[r - 1 for r in SHOWN_RANKS]].tolist()
        interval = f"{100 * low[0]:.1f} to {100 * high[0]:.1f}"
        line = "".join(f"{100 * value:8.1f}" for value in measures)
        print(f"{name:18}{line}{ranking.num_valid:9}{interval:>22}")
        results[name] = {
            "mAP": ranking.mAP, "mINP": ranking.mINP, "cmc": ranking.cmc.tolist(),
            "interval_95": dict(zip(("mAP", "mINP", "Rank-1"), map(list, zip(low, high)))),
            "valid_queries": ranking.num_valid, "unmatched_queries": ranking.num_unmatched,
        }  # fmt: skip
    write_json(output / "metrics.json", {**about, "results": results})


def add_details(output: Path, details: Mapping[str, Any]) -> None:
    """Add what TEST.DETAILS asks for to metrics.json, and print the thresholds among it."""
    for point in details["thresholds"]:
        limit = (
            f"cosine {point['cosine']:.3f} up" if "cosine" in point else f"distance {point['distance'] ** 0.5:.3f} down"
        )
        print(f"the same person from {limit}: so say {100 * point['true_positive_rate']:.1f} % of the matches and at "
              f"most 1 in {1 / point['false_positive_rate']:,.0f} of all other pairs")  # fmt: skip
    results = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    write_json(output / "metrics.json", {**results, **details})


def shown_queries(ranking: Ranking, query: Sequence[Record]) -> list[Record]:
    """Those in the pictures."""
    return [query[i] for i in choose_queries(_precision(ranking), SHOWN_QUERIES)]


def _precision(ranking: Ranking) -> np.ndarray:
    """Average precision (Q,), NaN where a query has no match."""
    matched = ranking.num_matches.numpy() > 0
    precision = np.full(len(matched), np.nan)
    precision[matched] = ranking.average_precisions
    return precision


def show(cfg: Config, split: Split, features: Tensor, ids: Ids, ranking: Ranking, maps: Maps | None) -> None:
    """Write ranks.png and attention.png, then report.html; the rank lists are those of the ranking."""
    output, num_query = Path(cfg.OUTPUT_DIR), len(split.query)
    nearest = top_k(features[:num_query], features[num_query:], *ids, k=10, metric="euclidean")
    distances, neighbours = (tensor.cpu() for tensor in nearest)
    shown = 1 - distances / 2 if cfg.TEST.FEAT_NORM else distances.sqrt()  # the cosine at unit length, else a distance
    lists = rank_lists(split.query, split.gallery, neighbours.numpy(), shown.numpy(), _precision(ranking))
    lists.save(output / RANK_LISTS)
    if maps is not None:
        attention_sheet(shown_queries(ranking, split.query), maps).save(output / ATTENTION)
    else:
        (output / ATTENTION).unlink(missing_ok=True)  # of another model
    draw_report(output, cfg)
