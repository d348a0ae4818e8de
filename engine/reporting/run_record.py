"""What a run left in its folder, read back: results, log lines and settings, each checked for its type."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from fusionreid.dataloading.records import DataError
from fusionreid.engine.config_yaml import flat
from fusionreid.engine.monitoring.jsonl import is_intact
from fusionreid.engine.reporting.charts import Point
from fusionreid.sealed import check_file, unsealed

MANIFEST, METRICS, QUERIES, LOG = "manifest.json", "metrics.json", "queries.json", "metrics.jsonl"

log = logging.getLogger(__name__)

# JSON has no word for a number that is not finite: the files of a run say NaN or null.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


Picture = Annotated[str, Field(pattern="^[A-Za-z0-9+/]*=*$")]  # base64


class FromFile(BaseModel, strict=True, extra="ignore"):
    """What is read of a JSON file; a wrong type is an error, other keys are left alone."""


class Result(FromFile):
    """How well one way of embedding retrieves; all but the count are fractions."""

    mAP: Number
    mINP: Number
    cmc: Annotated[list[Number], Field(min_length=1)]  # at [k - 1]: the share of queries with a match in the first k
    valid_queries: int
    interval_95: dict[str, tuple[Number, Number]] = {}  # of mAP, mINP and Rank-1
    unmatched_queries: int = 0
    data: str = ""  # set

    def rate_at(self, rank: int) -> float:
        """CMC at a rank; a list shorter than the rank has found all that it will."""
        return self.cmc[min(rank, len(self.cmc)) - 1]


class Counts(FromFile):
    """The size of one part of a data set."""

    images: int
    persons: int
    cameras: int


class DataCounts(FromFile):
    """The sizes of the parts of a data set."""

    train: Counts
    query: Counts
    gallery: Counts


class CameraPair(FromFile):
    """Result of the queries of one camera against the gallery images of another, by their names."""

    query: str | int
    gallery: str | int
    num_valid: int
    mAP: Number


class Threshold(FromFile):
    """Rates at one threshold over the pairs of all queries; the cosine is missing where features differ in length."""

    false_positive_rate: Annotated[float, Field(gt=0)]
    true_positive_rate: Number
    distance: Number  # squared
    cosine: float | None = None


class Pairs(FromFile):
    """Pairs of a query and a gallery image, of one person and of two, counted by their cosine or distance."""

    measure: str
    same_person: int
    other_person: int
    edges: list[float]
    same_counts: list[int]
    other_counts: list[int]
    roc: list[tuple[float, float]]  # false positive rate, true positive rate


class Confusion(FromFile):
    """Number of a person's queries that find one other person first."""

    person: str
    taken_for: str
    queries: int
    of: int


class Metrics(FromFile):
    """What the report shows of metrics.json."""

    data: str = ""
    note: str = ""
    evaluated: str = ""
    checkpoint: str = ""
    split: DataCounts | None = None
    results: dict[str, Result] = {}
    camera_pairs: list[CameraPair] = []
    thresholds: list[Threshold] = []
    pairs: Pairs | None = None
    confusions: list[Confusion] | None = None


class Shown(FromFile):
    """An image with the names of its person and camera; pictures are JPEG files in base64."""

    person: str
    camera: str
    picture: Picture


class Found(Shown):
    """A gallery image in a ranking."""

    score: Number
    right: bool


class ShownQuery(Shown):
    """A query, its nearest gallery images, and where the model looks in it."""

    kind: str  # best, median or worst
    average_precision: Number
    maps: dict[str, Picture]  # what a map shows -> picture
    found: list[Found]


class Queries(FromFile):
    """What queries.json holds."""

    measure: str = ""
    queries: list[ShownQuery] = []


class Manifest(FromFile):
    """What the report shows of manifest.json."""

    config: dict[str, Any] = {}
    device: str = ""


class LogLine(FromFile):
    """What the report shows of a line of metrics.jsonl."""

    epoch: Number = math.nan
    seconds: Number = math.nan  # since this start of the run
    loss: Number = math.nan
    mAP: Number = Field(math.nan, alias="eval/mAP")
    rank1: Number = Field(math.nan, alias="eval/rank1")


class RunRecord(NamedTuple):
    """What a run or an evaluation left in its folder; what is not there is empty."""

    name: str
    metrics: Metrics
    queries: Queries
    lines: list[LogLine]
    settings: dict[str, Any]  # the configuration in its manifest, dotted keys
    device: str

    @property
    def seconds(self) -> float:
        """Duration of the training up to its last log line, without the pauses between its starts."""
        times = [line.seconds for line in self.lines if math.isfinite(line.seconds)]
        return sum(time for time, later in zip(times, [*times[1:], 0.0]) if later < time)

    def curve(self, key: str, factor: float = 1.0) -> list[Point]:
        """Points (epoch, value) of the log lines that have a finite value for this key."""
        points = [(line.epoch, factor * getattr(line, key)) for line in self.lines]
        return [point for point in points if all(map(math.isfinite, point))]


FileContent = TypeVar("FileContent", bound=FromFile)


def read_run(folder: Path, name: str) -> RunRecord:
    """Read what is in a folder; DataError where that is neither a training nor an evaluation, or is damaged."""
    metrics, log_lines = folder / METRICS, folder / LOG
    if not (metrics.is_file() or log_lines.is_file()):
        raise DataError(f"{folder} holds neither {metrics.name} nor {log_lines.name}: train or evaluate that run first")
    manifest = _read(folder / MANIFEST, Manifest, "remove it to draw the report without it")
    if log_lines.is_file() and not manifest.config:
        log.warning("%s is missing: the settings of this training are not known", folder / MANIFEST)
    results = _read(metrics, Metrics, "evaluate that run again")
    queries = _read(folder / QUERIES, Queries, "evaluate that run again")
    lines = read_log(log_lines) if _is_there(log_lines, "remove it to draw the report without it") else []
    return RunRecord(name, results, queries, lines, dict(flat(manifest.config)), manifest.device)


def _read(path: Path, content: type[FileContent], remedy: str) -> FileContent:
    if not _is_there(path, remedy):
        return content()
    try:
        found = content.model_validate_json(raw := path.read_bytes())
        unsealed(raw, required=False)
        return found
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"]))
        raise DataError(f"{path} is damaged: {where and f'{where}: '}{error['msg']}; {remedy}") from invalid
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}; {remedy}") from error


def _is_there(path: Path, remedy: str) -> bool:
    if not path.is_symlink() and not path.exists():
        return False
    try:
        check_file(path)
    except OSError as error:
        raise DataError(f"{path} is damaged: {error}; {remedy}") from error
    return True


def read_log(path: Path) -> list[LogLine]:
    """Read log lines; a warning counts those that are damaged, such as the last one of a run that was killed."""
    texts = path.read_bytes().splitlines()
    lines = list(_log_lines(texts))
    if len(lines) < max(1, len(texts)):
        log.warning("%s: %d of %d lines are damaged and left out", path, len(texts) - len(lines), len(texts))
    return lines


def _log_lines(texts: Iterable[bytes]) -> Iterable[LogLine]:
    for text in texts:
        try:
            if is_intact(text):
                yield LogLine.model_validate_json(text)
        except ValidationError:
            continue
