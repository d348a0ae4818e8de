"""Cameras by name: those of new data are numbered as training numbered them, whatever list or folder they come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fusionreid.dataloading.datasets.names import camera_key
from fusionreid.dataloading.records import OWN, PARTS, DataError, Record, Split
from fusionreid.engine.config import Config
from fusionreid.engine.distributed.parallel import Ranks
from fusionreid.engine.evaluation.evaluator import MODEL, Evaluation, check_cameras, has_camera_embedding, split_ids
from fusionreid.engine.evaluation.retrieval import check_matches


@dataclass(frozen=True)
class EvaluationSet:
    """One of the data sets to evaluate on, its cameras numbered as in training."""

    split: Split
    cameras: tuple[int, ...]  # that the model has embeddings of
    name: str = ""  # where there are several
    first: bool = True  # whose results are those of the run

    @property
    def records(self) -> tuple[Record, ...]:
        """Queries, then the gallery."""
        return (*self.split.query, *self.split.gallery)

    def row(self, ranking: str) -> str:
        """Name of a ranking among those of all data sets."""
        return ", ".join(filter(None, [self.name, ranking if ranking != MODEL or not self.name else ""]))

    def config(self, cfg: Config) -> Config:
        """The configuration with the folder of this data set's results, a subfolder but for the first one."""
        folder = Path(cfg.OUTPUT_DIR, *(() if self.first else ("test", self.name)))
        return cfg.model_copy(update={"OUTPUT_DIR": str(folder)})


# Called by all ranks; the int is the step, the bool whether training ends with it.
Report = Callable[[Config, EvaluationSet, Evaluation, int, Ranks, bool], None]


def tested_sets(
    split: Split, datasets: Sequence[str], cameras: Sequence[int], names: Sequence[str], cfg: Config
) -> list[EvaluationSet]:
    """List the data sets to evaluate on; `datasets`, `cameras` and their names are those of training.

    DataError: the model lacks the embedding of a camera, and TEST.SIE_UNKNOWN is not mean. RetrievalError: no query has
    a match.
    """
    several = len(split.tests) > 1
    for test in split.tests:
        check_matches(*split_ids(test))
    return [
        EvaluationSet(*known_cameras(test, datasets, cameras, names, cfg), test.label if several else "", place == 0)
        for place, test in enumerate(split.tests)
    ]


def tested_in_training(split: Split, cfg: Config) -> list[EvaluationSet]:
    """List the data sets to evaluate on while `split` is trained on."""
    return tested_sets(split, [one.name for one in split.sets], split.cameras, split.names_of_cameras, cfg)


def known_cameras(
    split: Split, datasets: Sequence[str], cameras: Sequence[int], names: Sequence[str], cfg: Config
) -> tuple[Split, tuple[int, ...]]:
    """Number the cameras of a split as training did; also return those that the model has embeddings of.

    There are none if it was trained on one other data set. Own data are one data set here: their cameras go by name.
    """
    if len(datasets) > 1:
        split = number_as_trained(split, cameras, names, f"{split.label}/")
    elif {*datasets} & {*OWN}:
        split = number_as_trained(split, cameras, names)
    both_own = {*datasets, split.name} <= {*OWN}
    if len(datasets) != 1 or both_own or datasets[0].removesuffix("reid") == split.name:
        check_cameras(split, cameras, cfg)
        return split, tuple(cameras)
    if has_camera_embedding(cfg, cameras) and cfg.TEST.SIE_UNKNOWN == "error":
        raise DataError(
            f"the model was trained on {datasets[0]}: its camera embeddings are of other cameras than those of "
            f"{split.label}; set TEST.SIE_UNKNOWN mean to use the mean one, or train with MODEL.SIE_CAMERA no"
        )
    return split, ()


def number_as_trained(split: Split, cameras: Sequence[int], names: Sequence[str], prefix: str = "") -> Split:
    """Number the cameras of a split as training did with `names`; one that it never saw gets a number of its own.

    Of several data sets that training saw, `prefix` tells the names of this one. Where no name is known to training, as
    in a checkpoint without names, the numbers stay.
    """
    known = {camera_key(name.removeprefix(prefix)): n for n, name in zip(cameras, names) if name.startswith(prefix)}
    seen = {record.camera for part in PARTS for record in getattr(split, part)} if prefix else ()
    own = split.camera_names or {number: str(number + 1) for number in sorted(seen)}
    found = {number: known.get(camera_key(name)) for number, name in own.items()}
    unnamed = [*names] == [str(camera + 1) for camera in cameras]
    if not own or (unnamed and all(number is None for number in found.values())):
        return split
    free = max([*cameras, *own]) + 1
    number_of = {
        number: free + place if trained is None else trained for place, (number, trained) in enumerate(found.items())
    }
    train, query, gallery = (
        tuple(replace(record, camera=number_of[record.camera]) for record in getattr(split, part)) for part in PARTS
    )
    of_split = {number_of[number]: name for number, name in own.items()}
    named = {**dict(zip(cameras, names)), **of_split}
    return replace(split, train=train, query=query, gallery=gallery, camera_names=named)
