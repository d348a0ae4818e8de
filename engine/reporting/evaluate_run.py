"""The evaluation of a trained model, or of stored embeddings, from the configuration to the files in OUTPUT_DIR."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.engine.checkpoints.checkpoint import folder_of
from fusionreid.engine.checkpoints.load_model import build, find_checkpoint, restore
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel, peers
from fusionreid.engine.distributed.agreement import check_shared, decide
from fusionreid.engine.distributed.numerics import set_numerics
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.baselines import colour_histogram
from fusionreid.engine.evaluation.cameras import EvaluationSet, tested_sets
from fusionreid.engine.evaluation.details import details, nearest_images
from fusionreid.engine.evaluation.evaluator import (
    MODEL,
    Evaluation,
    rank_all,
    rank_features,
    record_ids,
    split_ids,
)
from fusionreid.engine.evaluation.extract import embed, images_of, own_rows, store
from fusionreid.engine.evaluation.finite import ROWS_AT_ONCE, check_finite
from fusionreid.engine.evaluation.measures import Ids
from fusionreid.engine.evaluation.names import KEY, Names
from fusionreid.engine.evaluation.retrieval import Ranking, check_matches
from fusionreid.engine.monitoring import memory
from fusionreid.engine.monitoring.manifest import describe_data, recorded_data
from fusionreid.engine.reporting.attention import attention_maps, grad_cam
from fusionreid.engine.reporting.queries import SHOWN_IMAGES
from fusionreid.engine.reporting.run_record import read_run
from fusionreid.engine.reporting.runs import draw_report
from fusionreid.engine.reporting.summary import (
    add_details,
    add_rows,
    print_results,
    shown_queries,
    write_report,
    write_results,
)
from fusionreid.errors import ReIDError

log = logging.getLogger(__name__)


def evaluate_checkpoint(cfg: Config, *, baselines: bool) -> None:
    """Evaluate a trained model on the data sets of the configuration: table, metrics.json and report in OUTPUT_DIR.

    All but the first have a folder of their own there, and rows in the table of the first.
    """
    output = Path(cfg.OUTPUT_DIR)
    ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
    set_numerics(cfg.SOLVER.PRECISION, deterministic=cfg.PARALLEL.DETERMINISTIC)
    check_shared(output, ranks)
    path = find_checkpoint(cfg)
    trained = restore(path, cfg)
    bad = BadImages(cfg.DATASETS.ON_BAD, output, ranks.main)
    data = cfg.DATASETS.only_tests
    split = decide(lambda: bad.check(read_split(data), ("query", "gallery")), ranks)
    tests = tested_sets(split, trained.datasets, trained.cameras, trained.camera_names, cfg)
    for test in tests:
        check_matches(*split_ids(test.split))
        embeddings.check_place(Path(test.config(cfg).OUTPUT_DIR) / "embeddings")
    model = parallel.replicate(trained.model, ranks, cfg.PARALLEL)
    untrained = None
    if baselines:
        torch.manual_seed(cfg.SOLVER.SEED)
        blank = build(cfg, max(split.num_persons, 1), max(trained.cameras) + 1)
        untrained = parallel.replicate(blank, ranks, cfg.PARALLEL)
    for test in tests:
        _evaluate_on(test, model, untrained, path, cfg, ranks)
    if ranks.main and len(tests) > 1:
        print_results(read_run(output, "").metrics.results)
    parallel.finish()


def _evaluate_on(
    test: EvaluationSet, model: nn.Module, untrained: nn.Module | None, path: Path, cfg: Config, ranks: Ranks
) -> None:
    """Evaluate the model of the checkpoint `path` on one data set, and write what was found to the folder of that."""
    split, own, quiet = test.split, test.config(cfg), bool(test.name)
    output = Path(own.OUTPUT_DIR)
    ids, records, num_query = split_ids(split), (*split.query, *split.gallery), len(split.query)
    images = images_of(records, cfg, ranks, root=split.root)
    features = embed(model, images, test.cameras, cfg, ranks)
    source = _source(cfg, test, describe_data(split), path)
    mine = features[own_rows(len(records), ranks)]
    named = {**source, **Names.of(split).as_source()}
    store(output / "embeddings", mine.split(ROWS_AT_ONCE), (len(mine), mine.shape[1]), records, num_query, named, ranks)
    rankings = rank_all(features, num_query, ids, cfg, ranks)
    if untrained is not None:
        vectors = embed(untrained, images, test.cameras, cfg, ranks)
        rankings["untrained"] = rank_features(vectors[:num_query], vectors[num_query:], ids, ranks)
        histograms = parallel.gather_rows(torch.from_numpy(colour_histogram(records[own_rows(len(records), ranks)])))
        rankings["colour histogram"] = rank_features(histograms[:num_query], histograms[num_query:], ids, ranks)
    rows = {test.row(name): ranking for name, ranking in rankings.items()}
    _write(own, features, num_query, ids, rows, source, ranks, Names.of(split), quiet=quiet)
    shown, matches = shown_queries(rankings[MODEL], split, features, ids)
    with torch.compiler.set_stance("force_eager"):  # the maps are read by hooks, which compiled blocks don't call
        maps = attention_maps(model, shown, test.cameras, cfg, ranks) | grad_cam(model, shown, matches, cfg, ranks)
    nearest = nearest_images(features, num_query, ids, ranks, SHOWN_IMAGES)
    if ranks.main:
        write_report(own, split, rankings[MODEL], nearest, maps, quiet=False)
        _show_in_main_report(test, cfg)


def _show_in_main_report(test: EvaluationSet, cfg: Config) -> None:
    """Add the rows of a data set but the first one to the report of the run."""
    if not test.first:
        add_rows(Path(cfg.OUTPUT_DIR), Path(test.config(cfg).OUTPUT_DIR))
        draw_report(Path(cfg.OUTPUT_DIR), cfg, quiet=True)


def report_evaluation(
    cfg: Config, test: EvaluationSet, evaluation: Evaluation, step: int, ranks: Ranks, is_last: bool
) -> None:
    """Write the report of an evaluation in training, without maps, and after the last one its vectors, to be searched.

    All ranks call it after `step` steps. A disk that takes nothing does not end the training.
    """
    split, own = test.split, test.config(cfg)
    features, rankings, output = evaluation.features, evaluation.rankings, Path(own.OUTPUT_DIR)
    ids, num_query = split_ids(split), len(split.query)
    with memory.explained("evaluation", cfg):
        nearest = nearest_images(features, num_query, ids, ranks, SHOWN_IMAGES)
        more = details(features, num_query, ids, ranks) if cfg.TEST.DETAILS else {}
    if ranks.main:
        try:
            described = ({} if test.name else recorded_data(output)) or describe_data(split)
            checkpoint = folder_of(Path(cfg.OUTPUT_DIR) / "checkpoints", step)
            source = _source(cfg, test, described, checkpoint)
            write_results(output, {test.row(name): each for name, each in rankings.items()}, source, quiet=True)
            if more:
                add_details(output, more, Names.of(split), quiet=True)
            write_report(own, split, rankings[MODEL], nearest, {}, quiet=True)
            _show_in_main_report(test, cfg)
            if is_last:
                embeddings.check_place(folder := output / "embeddings")
                embeddings.save(folder, features, test.records, num_query, {**source, **Names.of(split).as_source()})
        except (OSError, ReIDError) as error:
            log.warning("report or vectors were not written: %s; training continues", error)
    peers.meet()  # it may take the first rank a while


def evaluate_stored(cfg: Config) -> None:
    """Rank the embeddings in TEST.EMBEDDINGS again: table and metrics.json in OUTPUT_DIR; no model, no images."""
    ranks = parallel.start("cpu")
    stored = embeddings.load(embeddings.folder_at(Path(cfg.TEST.EMBEDDINGS)))
    ids = record_ids(stored.records, stored.num_query)
    check_matches(*ids)
    check_finite(stored.features, stored.records)
    rankings = rank_all(stored.features, stored.num_query, ids, cfg, ranks)
    kept = {key: value for key, value in stored.source.items() if key != KEY}
    source = {**kept, "embeddings": cfg.TEST.EMBEDDINGS, "ranking": cfg.TEST.model_dump(mode="json")}
    names = Names.from_source(stored.source)
    _write(cfg, stored.features, stored.num_query, ids, rankings, source, ranks, names, quiet=False)
    parallel.finish()


def _source(cfg: Config, test: EvaluationSet, described: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Tell what was evaluated."""
    return {
        "data": test.name or test.split.name,
        "note": test.split.note,
        "split": described,
        "checkpoint": str(checkpoint.absolute()),
        "TEST": cfg.TEST.model_dump(mode="json"),
    }


def _write(
    cfg: Config,
    features: Tensor,
    num_query: int,
    ids: Ids,
    rankings: Mapping[str, Ranking],
    source: Mapping[str, Any],
    ranks: Ranks,
    names: Names,
    *,
    quiet: bool,
) -> None:
    """Write the results, and only then compute and add the details that TEST.DETAILS asks for."""
    if ranks.main:
        write_results(Path(cfg.OUTPUT_DIR), rankings, source, quiet=quiet)
    if cfg.TEST.DETAILS:
        more = details(features, num_query, ids, ranks)
        if ranks.main:
            add_details(Path(cfg.OUTPUT_DIR), more, names, quiet=quiet)
