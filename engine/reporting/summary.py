"""Results of an evaluation: the printed table, metrics.json with intervals and details, queries.json and the report."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionreid.dataloading.records import Record, Split
from fusionreid.engine.config import Config
from fusionreid.engine.evaluation.details import nearest_match
from fusionreid.engine.evaluation.measures import Ids, bootstrap
from fusionreid.engine.evaluation.names import Names, cosine_text
from fusionreid.engine.evaluation.retrieval import Ranking
from fusionreid.engine.reporting.queries import Maps, camera_name, choose_queries, confusions, describe_queries
from fusionreid.engine.reporting.run_record import METRICS, QUERIES, Result
from fusionreid.engine.reporting.runs import draw_report
from fusionreid.engine.reporting.sections import SHOWN_RANKS
from fusionreid.sealed import unseal, write_sealed

VECTOR = "FEAT", "NECK_FEAT", "FEAT_NORM", "FLIP"  # what of TEST decides a vector


def write_results(output: Path, rankings: Mapping[str, Ranking], about: Mapping[str, Any], *, quiet: bool) -> None:
    """Write metrics.json, measures by name and what they are about, and print the table unless `quiet`."""
    results = {}
    for name, ranking in rankings.items():
        each = [ranking.average_precisions, ranking.inverse_penalties, (ranking.first_ranks == 1).double()]
        low, high = (limits.tolist() for limits in bootstrap(torch.stack(each, 1)))
        results[name] = Result(
            mAP=ranking.mAP,
            mINP=ranking.mINP,
            cmc=ranking.cmc.tolist(),
            valid_queries=ranking.num_valid,
            interval_95=dict(zip(("mAP", "mINP", "Rank-1"), zip(low, high))),
            unmatched_queries=ranking.num_unmatched,
            data=about.get("data", ""),
        )
    if not quiet:
        print_results(results)
    output.mkdir(parents=True, exist_ok=True)
    (output / QUERIES).unlink(missing_ok=True)  # of another evaluation
    evaluated = datetime.now(UTC).isoformat(timespec="seconds")
    dumped = {name: result.model_dump() for name, result in results.items()}
    kept = _kept(output / METRICS, about)
    write_sealed(output / METRICS, {**kept, **about, "evaluated": evaluated, "results": dumped})


def print_results(results: Mapping[str, Result]) -> None:
    """Print the table of results."""
    columns = "mAP", "mINP", *(f"Rank-{rank}" for rank in SHOWN_RANKS)
    width = max(18, *(len(name) + 1 for name in results))
    print(f"{'%':{width}}{''.join(f'{column:>8}' for column in columns)}{'queries':>9}{'mAP, 95 % interval':>22}")
    for name, result in results.items():
        rates = "".join(f"{100 * v:8.1f}" for v in (result.mAP, result.mINP, *map(result.rate_at, SHOWN_RANKS)))
        low, high = result.interval_95["mAP"]
        print(f"{name:{width}}{rates}{result.valid_queries:9}{f'{100 * low:.1f} to {100 * high:.1f}':>22}")


def add_rows(output: Path, test: Path) -> None:
    """Add the results in the folder of another data set to those in `output`."""
    _add(output, {"results": {**unseal(output / METRICS)["results"], **unseal(test / METRICS)["results"]}})


def _kept(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier evaluation of the same vectors found out besides, such as the thresholds."""
    try:
        earlier = unseal(path)
        same = _vectors(earlier) == _vectors(json.loads(json.dumps(about)))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # none, or damaged: it is replaced
        return {}
    return {key: value for key, value in earlier.items() if key not in about} if same else {}


def _vectors(about: Mapping[str, Any]) -> list[Any]:
    """Return what tells vectors from others: the checkpoint, the images, and the settings that shape a vector."""
    test = about.get("TEST", {})
    return [about["checkpoint"], about["split"]["digest"], *(test.get(key) for key in VECTOR)]


def add_details(output: Path, details: Mapping[str, Any], names: Names, *, quiet: bool) -> None:
    """Add what TEST.DETAILS asks for to metrics.json, cameras by name, and print the thresholds unless `quiet`."""
    for point in [] if quiet else details["thresholds"]:
        cosine, distance = point.get("cosine"), point["distance"] ** 0.5
        limit = f"distance at most {distance:.3f}" if cosine is None else f"cosine at least {cosine_text(cosine)}"
        found, rarity = 100 * point["true_positive_rate"], 1 / point["false_positive_rate"]
        print(f"same person if {limit}: finds {found:.1f} % of the matches, accepts 1 in {rarity:,.0f} other pairs")
    pairs = [
        {**pair, "query": camera_name(names, pair["query"]), "gallery": camera_name(names, pair["gallery"])}
        for pair in details["camera_pairs"]
    ]
    _add(output, {**details, "camera_pairs": pairs})


def _add(output: Path, more: Mapping[str, Any]) -> None:
    known = unseal(output / METRICS)
    write_sealed(output / METRICS, {**known, **more})


def precision_of(ranking: Ranking) -> np.ndarray:
    """Return the average precision (Q,), NaN where a query has no match."""
    matched = ranking.num_matches.numpy() > 0
    precision = np.full(len(matched), np.nan)
    precision[matched] = ranking.average_precisions
    return precision


def shown_queries(
    ranking: Ranking, split: Split, features: Tensor, ids: Ids
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Return the queries that the report shows, and the match of each that is nearest to it."""
    chosen = choose_queries(precision_of(ranking))
    matches = [nearest_match(features, len(split.query), ids, i) for i in chosen]
    return [split.query[i] for i in chosen], [split.gallery[j] for j in matches]


def write_report(
    cfg: Config, split: Split, ranking: Ranking, nearest: tuple[Tensor, Tensor], maps: Maps, *, quiet: bool
) -> None:
    """Write queries.json, add the confusions to metrics.json, then draw report.html.

    `nearest` are squared distances and gallery indices of the images nearest to each query, (Q, k) each.
    """
    output, precision = Path(cfg.OUTPUT_DIR), precision_of(ranking)
    distances, indices = nearest[0], nearest[1].numpy()
    scores = (1 - distances / 2 if cfg.TEST.FEAT_NORM else distances.sqrt()).numpy()
    shown = describe_queries(split, choose_queries(precision), precision, indices, scores, maps)
    measure = "cosine" if cfg.TEST.FEAT_NORM else "distance"
    write_sealed(output / QUERIES, {"measure": measure, "queries": shown})
    _add(output, {"confusions": confusions(split, indices)})
    draw_report(output, cfg, quiet=quiet)
