"""The configuration: a YAML file and overrides become one `Config`, or one `ConfigError` with every mistake."""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from fusionreid.config import ModelConfig, Rate, Section
from fusionreid.dataloading.config import DataloaderConfig, DatasetsConfig, InputConfig
from fusionreid.engine import config_yaml
from fusionreid.engine.config_files import NoSuchConfig, find_config
from fusionreid.engine.config_hints import keys_like
from fusionreid.errors import ReIDError
from fusionreid.schema import FolderText, PathText, Switch, words

LONGEST = 100_000  # characters of a file
TOLD = 100  # mistakes in a message; a configuration has about as many keys


class ConfigError(ReIDError, ValueError):
    """Every mistake of a configuration, one per line."""


Loggers = Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(words)]


class SolverConfig(Section):
    """Optimiser, schedule and rhythm of training."""

    OPTIMIZER_NAME: Literal["SGD", "AdamW", "Adam"] = "SGD"  # optimiser
    OPTIMIZER_IMPL: Literal["torch", "apex"] = "torch"  # apex: NVIDIA's, to be built from its source, on a GPU
    MAX_EPOCHS: PositiveInt = 180  # epochs to train
    IMS_PER_BATCH: PositiveInt = 128  # over all processes: persons x DATALOADER.NUM_INSTANCE
    BASE_LR: PositiveFloat = 0.005  # learning rate after the warm-up
    BIAS_LR_FACTOR: PositiveFloat = 2.0  # rate of biases, relative to BASE_LR
    LARGE_FC_LR: Switch = False  # classifiers learn at twice BASE_LR
    MOMENTUM: Annotated[float, Field(ge=0, lt=1)] = 0.9  # momentum of SGD
    WEIGHT_DECAY: NonNegativeFloat = 1e-4  # weight decay of all but biases
    WEIGHT_DECAY_BIAS: NonNegativeFloat = 1e-4  # weight decay of biases
    WARMUP_ITERS: NonNegativeInt = 10  # epochs of linear warm-up, before the cosine
    MARGIN: NonNegativeFloat = 0.3  # of the triplet loss where MODEL.NO_MARGIN is no
    COSINE_MARGIN: Annotated[float, Field(ge=0, lt=1)] = 0.5  # of MODEL.ID_LOSS_TYPE cosface, or in radians of arcface
    COSINE_SCALE: PositiveFloat = 30.0  # of the cosines in that loss
    CENTER_LR: PositiveFloat = 0.5  # rate of the centers where MODEL.IF_WITH_CENTER is yes
    CENTER_LOSS_WEIGHT: NonNegativeFloat = 0.0005  # weight of the center loss
    PRECISION: Literal["fp32", "bf16", "fp16"] = "bf16"  # of activations; weights are fp32, fp16 scales the loss
    TRIPLET_PRODUCTS: Literal["fp32", "amp"] = "fp32"  # amp: in PRECISION, noisy as published, for comparison
    MAX_GRAD_NORM: NonNegativeFloat = 0.0  # gradients are clipped to this norm; 0: not at all
    ACCUMULATE: PositiveInt = 1  # parts of a process's batch that are computed in turn; mining sees the whole batch
    EMA: Rate = 0.0  # decay of the moving average of the weights, which is then evaluated; 0: no average
    SEED: Annotated[int, Field(ge=0, lt=2**32)] = 1111  # seed of weights, order and augmentation
    CHECKPOINT_PERIOD: PositiveInt = 180  # epochs between two checkpoints
    EVAL_PERIOD: PositiveInt = 30  # epochs between two evaluations
    LOG_PERIOD: PositiveInt = 100  # steps between two log lines
    LOGGERS: Loggers = ("tensorboard",)  # beside metrics.jsonl: any of tensorboard, wandb, trackio
    PROFILE: NonNegativeInt = 0  # steps traced after the first ten, into OUTPUT_DIR/profile-*.json.gz; 0: none

    STEPS: Annotated[tuple[int, ...], "the schedule is a cosine"] = (40, 70)
    GAMMA: Annotated[float, "the schedule is a cosine"] = 0.1
    WARMUP_FACTOR: Annotated[float, "warm-up starts at 0.01 of BASE_LR"] = 0.01
    WARMUP_METHOD: Annotated[str, "warm-up is linear"] = "linear"
    CLUSTER_MARGIN: Annotated[float, "there is no cluster loss"] = 0.3
    RANGE_K: Annotated[float, "there is no range loss"] = 2.0
    RANGE_MARGIN: Annotated[float, "there is no range loss"] = 0.3
    RANGE_ALPHA: Annotated[float, "there is no range loss"] = 0.0
    RANGE_BETA: Annotated[float, "there is no range loss"] = 1.0
    RANGE_LOSS_WEIGHT: Annotated[float, "there is no range loss"] = 1.0


def _word(value: Any) -> Any:
    return config_yaml.plain(value) if isinstance(value, str) else value  # 'no' means no


def _off(value: Any) -> Any:
    return "off" if value is False else value  # a bare `off` in YAML


Exact = Annotated[Literal["auto", False, True], BeforeValidator(_word)]


class ParallelConfig(Section):
    """How the work of a step is compiled and spread over the processes that torchrun started."""

    EXACT: Exact = "auto"  # batch norm and mining over all processes, so that N compute what one does; auto: yes
    COMPILE: Annotated[Literal["auto", "off", "blocks", "whole"], BeforeValidator(_off)] = "auto"  # blocks on a GPU
    GRAPH: Switch = False  # the step as one CUDA graph: one process on a GPU, bf16 or fp32; never run on a GPU yet
    CHECKPOINT: Switch = False  # Transformer blocks and HTM layers recompute their activations: less memory, more time
    DETERMINISTIC: Switch = False  # the same bits in every run on a GPU too, where it costs speed
    SHARD: NonNegativeInt = 0  # processes that share one copy of the weights; 0: those of one host; 1: each its own


# yes: k-reciprocal with k1 20, k2 6, weight 0.3 as its paper has it; published: with 50, 15, 0.3
ReRanking = Annotated[Literal[False, True, "published"], BeforeValidator(_word)]


class TestConfig(Section):
    """What is evaluated, and how."""

    WEIGHT: PathText = ""  # checkpoint, or a run: its newest; empty: that of OUTPUT_DIR; best: that of the highest mAP
    IMS_PER_BATCH: PositiveInt = 256  # test images per batch and process
    FEAT: Annotated[int, Field(ge=0, le=6)] = 0  # 0: all heads concatenated; 1..6: one of them
    NECK_FEAT: Literal["before", "after"] = "before"  # features before or after the batch norm neck
    FEAT_NORM: Switch = True  # unit length
    FLIP: Switch = False  # features are the mean of an image's and its mirror image's
    RE_RANKING: ReRanking = False  # no, yes or published
    QUERY_EXPANSION: NonNegativeInt = 0  # nearest gallery images averaged into a query for a row of its own; 0: none
    DETAILS: Switch = True  # also camera pairs, thresholds, ROC, single gallery shot, multi-query in report and metrics
    EMBEDDINGS: PathText = ""  # folder of an earlier evaluation to rank again, without a model; empty: embed
    SIE_UNKNOWN: Literal["error", "mean"] = "error"  # a camera that training never saw: stop, or the mean embedding


class Config(Section):
    """The whole configuration."""

    MODEL: ModelConfig = ModelConfig()
    INPUT: InputConfig = InputConfig()
    DATASETS: DatasetsConfig = DatasetsConfig()
    DATALOADER: DataloaderConfig = DataloaderConfig()
    SOLVER: SolverConfig = SolverConfig()
    TEST: TestConfig = TestConfig()
    PARALLEL: ParallelConfig = ParallelConfig()
    OUTPUT_DIR: FolderText = "./log"  # logs, checkpoints, results

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        batch, instances = self.SOLVER.IMS_PER_BATCH, self.DATALOADER.NUM_INSTANCE
        if batch % instances or batch < 2 * instances:
            rule = f"2 or more persons with DATALOADER.NUM_INSTANCE ({instances}) images each, got {batch}"
            raise _contradiction(rule, "SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE")
        train, test = self.INPUT.SIZE_TRAIN, self.INPUT.SIZE_TEST
        if self.MODEL.TRANS_USE and train != test:
            rule = f"INPUT.SIZE_TRAIN {train}, for which the Transformer's positions are made, got {test}"
            raise _contradiction(rule, "INPUT.SIZE_TEST", "INPUT.SIZE_TRAIN", "MODEL.TRANS_USE")
        if self.TEST.FEAT > 1 and not (self.MODEL.RES_USE and self.MODEL.TRANS_USE):
            rule = f"0 or 1, since a model of one branch has one head, got {self.TEST.FEAT}"
            raise _contradiction(rule, "TEST.FEAT", "MODEL.RES_USE", "MODEL.TRANS_USE")
        dropout = self.MODEL.TRANS_USE and (self.MODEL.DROP_OUT or self.MODEL.ATT_DROP_RATE)
        if self.PARALLEL.EXACT is True and dropout:
            rule = "auto or no where the Transformer has dropout, whose draws depend on the number of processes"
            raise _contradiction(rule, "PARALLEL.EXACT", "MODEL.DROP_OUT", "MODEL.ATT_DROP_RATE")
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about keys that differ from their default and yet have no effect."""
        idle = {key: text for key, field in KEYS.items() for text in field.metadata if isinstance(text, str)}
        if self.SOLVER.PRECISION == "fp16" or self.SOLVER.ACCUMULATE > 1 or self.PARALLEL.CHECKPOINT:
            idle["PARALLEL.GRAPH"] = "with fp16, ACCUMULATE or CHECKPOINT a step is not the same launches every time"
        if self.SOLVER.OPTIMIZER_IMPL == "apex":
            idle["PARALLEL.GRAPH"] = "apex's kernels would keep the first learning rate"
        if self.MODEL.NO_MARGIN:
            idle["SOLVER.MARGIN"] = "MODEL.NO_MARGIN is yes"
        if self.MODEL.ID_LOSS_TYPE == "softmax":
            idle["SOLVER.COSINE_MARGIN"] = idle["SOLVER.COSINE_SCALE"] = "MODEL.ID_LOSS_TYPE is softmax"
        if len(self.DATASETS.sets) == 1:
            idle["DATALOADER.BALANCE_SETS"] = "DATASETS.NAMES is one data set"
        if not self.MODEL.IF_WITH_CENTER:
            idle["SOLVER.CENTER_LR"] = idle["SOLVER.CENTER_LOSS_WEIGHT"] = "MODEL.IF_WITH_CENTER is no"
        values = {key: attrgetter(key)(self) for key in idle}
        set_ones = [key for key in idle if values[key] != KEYS[key].default]
        return tuple(f"{key}: {values[key]!r} has no effect: {idle[key]}" for key in set_ones)

    def dump(self) -> str:
        """Write every key as YAML; `load_config` reads it back to an equal `Config`."""
        return config_yaml.dump(self.model_dump())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Build from the result of `model_dump`, also after a walk through JSON."""
        return _build(config_yaml.dump(values), "saved config", (), [])


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the shipped one of this name, under overrides of the form `KEY=VALUE` or `KEY`, `VALUE`.

    ConfigError holds every mistake.
    """
    problems: list[str] = []
    text = ""
    try:
        path = find_config(path)
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            text = ""
            problems.append(f"{path}: has over {LONGEST:,} characters, a configuration has a few thousand: not read")
    except NoSuchConfig as error:
        problems.append(str(error))
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
    return _build(text, str(path), overrides, problems)


def _build(text: str, name: str, overrides: Sequence[str], problems: list[str]) -> Config:
    settings = config_yaml.read_yaml(text, name, SECTIONS, problems)
    settings |= config_yaml.read_overrides(overrides, KEYS, problems)
    unknown = [key for key in settings if key not in KEYS]
    where = {key: settings.pop(key) for key in unknown}
    problems += [f"{where[key].where}: {key}: {_unknown(key, where[key].value)}" for key in unknown[:TOLD]]
    config = config_yaml.validate(Config, settings, problems)
    if problems:
        told = [line if line.isprintable() else ascii(line)[1:-1] for line in problems[:TOLD]]
        more = len(problems) - len(told) + len(unknown[TOLD:])
        raise ConfigError("\n".join([*told, *([f"and {more:,} more mistakes"] if more else [])]))
    return config


def _unknown(key: str, value: Any) -> str:
    if key in SECTIONS:
        return f"is a section of keys, got {value!r}"
    section = difflib.get_close_matches(key.upper(), SECTIONS, n=1)
    meant = section if key.upper() in SECTIONS else keys_like(key, KEYS) or section
    return "unknown key" + (f", did you mean {' or '.join(meant)}?" if meant else "")


def _contradiction(rule: str, *keys: str) -> PydanticCustomError:
    return PydanticCustomError("contradiction", f"must be {rule}", {"keys": keys})


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


KEYS = dict(_fields(Config))  # dotted
SECTIONS = {key.rpartition(".")[0] for key in KEYS} - {""}
