"""The evaluation of a trained model, or of stored embeddings, from the configuration to the files in OUTPUT_DIR."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionreid.dataloading import read_split
from fusionreid.dataloading.bad_images import BadImages
from fusionreid.dataloading.records import DataError, Split
from fusionreid.engine.checkpoints.checkpoint import folder_of
from fusionreid.engine.checkpoints.load_model import Trained, build, find_checkpoint, restore
from fusionreid.engine.config import Config
from fusionreid.engine.distributed import parallel, peers
from fusionreid.engine.distributed.agreement import check_shared, decide
from fusionreid.engine.distributed.numerics import set_numerics
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation import embeddings
from fusionreid.engine.evaluation.baselines import colour_histogram
from fusionreid.engine.evaluation.cameras import number_as_trained
from fusionreid.engine.evaluation.details import details, nearest_images
from fusionreid.engine.evaluation.evaluator import (
    MODEL,
    Evaluation,
    check_cameras,
    has_camera_embedding,
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
from fusionreid.engine.reporting.summary import add_details, shown_queries, write_report, write_results

OWN = "folder", "market", "csv"  # readers of own data, one model for all

log = logging.getLogger(__name__)


def evaluate_checkpoint(cfg: Config, *, baselines: bool) -> None:
    """Evaluate a trained model on the data set of the configuration: table, metrics.json and report in OUTPUT_DIR."""
    output = Path(cfg.OUTPUT_DIR)
    folder = output / "embeddings"
    embeddings.check_place(folder)
    ranks = parallel.start(cfg.MODEL.DEVICE, required="DEVICE" in cfg.MODEL.model_fields_set)
    set_numerics(cfg.SOLVER.PRECISION, deterministic=cfg.PARALLEL.DETERMINISTIC)
    check_shared(output, ranks)
    path = find_checkpoint(cfg)
    trained = restore(path, cfg)
    bad = BadImages(cfg.DATASETS.ON_BAD, output, ranks.main)
    split = decide(lambda: bad.check(read_split(cfg.DATASETS), ("query", "gallery")), ranks)
    if trained.dataset in OWN:
        split = number_as_trained(split, trained.cameras, trained.camera_names)
    ids, records, num_query = split_ids(split), (*split.query, *split.gallery), len(split.query)
    check_matches(*ids)
    cameras = known_cameras(trained, split, cfg)
    model = parallel.replicate(trained.model, ranks, cfg.PARALLEL)
    images = images_of(records, cfg, ranks, root=split.root)
    features = embed(model, images, cameras, cfg, ranks)
    source = _source(cfg, split, describe_data(split), path)
    mine = features[own_rows(len(records), ranks)]
    named = {**source, **Names.of(split).as_source()}
    store(folder, mine.split(ROWS_AT_ONCE), (len(mine), mine.shape[1]), records, num_query, named, ranks)
    rankings = rank_all(features, num_query, ids, cfg, ranks)
    if baselines:
        torch.manual_seed(cfg.SOLVER.SEED)
        untrained = build(cfg, max(split.num_persons, 1), max(trained.cameras) + 1)
        vectors = embed(parallel.replicate(untrained, ranks, cfg.PARALLEL), images, cameras, cfg, ranks)
        rankings["untrained"] = rank_features(vectors[:num_query], vectors[num_query:], ids, ranks)
        histograms = parallel.gather_rows(torch.from_numpy(colour_histogram(records[own_rows(len(records), ranks)])))
        rankings["colour histogram"] = rank_features(histograms[:num_query], histograms[num_query:], ids, ranks)
    _write(cfg, features, num_query, ids, rankings, source, ranks, Names.of(split))
    shown, matches = shown_queries(rankings[MODEL], split, features, ids)
    with torch.compiler.set_stance("force_eager"):  # the maps are read by hooks, which compiled blocks don't call
        maps = attention_maps(model, shown, cameras, cfg, ranks) | grad_cam(model, shown, matches, cfg, ranks)
    nearest = nearest_images(features, num_query, ids, ranks, SHOWN_IMAGES)
    if ranks.main:
        write_report(cfg, split, rankings[MODEL], nearest, maps, quiet=False)
    parallel.finish()


def report_evaluation(cfg: Config, split: Split, evaluation: Evaluation, step: int, ranks: Ranks) -> None:
    """Write the report of an evaluation in training, without maps; a disk that takes none does not end the training.

    All ranks call it after `step` steps.
    """
    features, rankings, output = evaluation.features, evaluation.rankings, Path(cfg.OUTPUT_DIR)
    ids, num_query = split_ids(split), len(split.query)
    with memory.explained("evaluation", cfg):
        nearest = nearest_images(features, num_query, ids, ranks, SHOWN_IMAGES)
        more = details(features, num_query, ids, ranks) if cfg.TEST.DETAILS else {}
    if ranks.main:
        try:
            described = recorded_data(output) or describe_data(split)
            source = _source(cfg, split, described, folder_of(output / "checkpoints", step))
            write_results(output, rankings, source, quiet=True)
            if more:
                add_details(output, more, Names.of(split), quiet=True)
            write_report(cfg, split, rankings[MODEL], nearest, {}, quiet=True)
        except (OSError, DataError) as error:
            log.warning("the report was not written: %s; training continues", error)
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
    _write(cfg, stored.features, stored.num_query, ids, rankings, source, ranks, names)
    parallel.finish()


def known_cameras(trained: Trained, split: Split, cfg: Config) -> tuple[int, ...]:
    """Cameras of the split that the model has embeddings of: none, if it was trained on another data set."""
    both_own = trained.dataset in OWN and cfg.DATASETS.NAMES in OWN  # cameras go by their names
    if trained.dataset is None or both_own or _bare(trained.dataset) == _bare(cfg.DATASETS.NAMES):
        check_cameras(split, trained.cameras, cfg)
        return trained.cameras
    if has_camera_embedding(cfg, trained.cameras) and cfg.TEST.SIE_UNKNOWN == "error":
        raise DataError(
            f"the checkpoint was trained on {trained.dataset}: its camera embeddings are of other cameras than "
            f"those of {split.name}; set TEST.SIE_UNKNOWN mean to use the mean one, or train with MODEL.SIE_CAMERA no"
        )
    return ()


def _bare(name: str) -> str:
    """A data set's name without case, punctuation and the ending that some give it."""
    return re.sub("[^a-z0-9]", "", name.lower()).removesuffix("reid")


def _source(cfg: Config, split: Split, described: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Tell what was evaluated."""
    return {
        "data": split.name,
        "note": split.note,
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
) -> None:
    """Write the results, and only then compute and add the details that TEST.DETAILS asks for."""
    if ranks.main:
        write_results(Path(cfg.OUTPUT_DIR), rankings, source, quiet=False)
    if cfg.TEST.DETAILS:
        more = details(features, num_query, ids, ranks)
        if ranks.main:
            add_details(Path(cfg.OUTPUT_DIR), more, names, quiet=False)
