"""The INPUT, DATASETS and DATALOADER sections of the configuration."""

import re
from collections.abc import Sequence
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from fusionreid.schema import FolderText, Probability, Section, Switch, Text, words

Pixels = Annotated[int, Field(ge=16, le=4096)]
Size = tuple[Pixels, Pixels]  # height, width


Means = tuple[Probability, Probability, Probability]
Deviations = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class InputConfig(Section):
    """From a decoded image to the model's input."""

    SIZE_TRAIN: Size = (256, 128)  # height and width of training images, in pixels
    SIZE_TEST: Size = (256, 128)  # height and width of test images, in pixels
    PROB: Probability = 0.5  # probability of a horizontal flip
    RE_PROB: Probability = 0.5  # probability of random erasing
    PADDING: NonNegativeInt = 10  # black pixels on every side before the random crop
    PIXEL_MEAN: Means = (0.5, 0.5, 0.5)  # mean of red, green, blue; pixels are 0..1
    PIXEL_STD: Deviations = (0.5, 0.5, 0.5)  # standard deviation of red, green, blue


class SyntheticConfig(Section):
    """The rendered data set, written to ROOT_DIR in the Market-1501 layout."""

    PERSONS: PositiveInt = 64  # identities to train on
    TEST_PERSONS: PositiveInt = 32  # identities in query and gallery, none of them in training
    CAMERAS: Annotated[int, Field(ge=2)] = 4  # a query is searched in the other cameras
    IMAGES: PositiveInt = 4  # per person and camera
    SEED: NonNegativeInt = 0  # of the persons and their images
    SIZE: Size = (128, 64)  # height, width in pixels


def plain_name(name: str) -> str:
    """Return the name of a data set without case and punctuation."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _names(value: Any) -> Any:
    """Read one name, or a list of them; a list of one, as other trainers write it, is its name."""
    names = words(value)
    if not (isinstance(names, list | tuple) and names and all(isinstance(name, str) and name for name in names)):
        raise PydanticCustomError("names", "must be a data set, or a list of them, got {got}", {"got": repr(value)})
    return names[0] if len(names) == 1 else tuple(names)


Names = Annotated[str | tuple[str, ...], BeforeValidator(_names)]


class DatasetsConfig(Section):
    """Which data sets, and where they lie. A set elsewhere than in ROOT_DIR is named with its own, as csv:shop.csv."""

    NAMES: Names = "msmt17"  # one or several of market1501, dukemtmc, msmt17, synthetic; own data: folder, market, csv
    TEST: Annotated[tuple[Text, ...], BeforeValidator(words)] = ()  # sets to evaluate on; empty: each of NAMES
    ROOT_DIR: FolderText = "./data"  # folder that holds the data set
    ON_BAD: Literal["error", "skip"] = "error"  # an image file that cannot be used; skip: up to one in a thousand
    SYNTHETIC: SyntheticConfig = SyntheticConfig()

    @property
    def sets(self) -> tuple["DatasetsConfig", ...]:
        """Data sets to train on, each as a configuration of its own."""
        return self._each((self.NAMES,) if isinstance(self.NAMES, str) else self.NAMES)

    @property
    def test_sets(self) -> tuple["DatasetsConfig", ...]:
        """Data sets to evaluate on; the first one chooses the best checkpoint."""
        return self._each(self.TEST) or self.sets

    @property
    def only_tests(self) -> "DatasetsConfig":
        """The configuration without the sets that are only trained on."""
        return self.model_copy(update={"NAMES": self.TEST or self.NAMES, "TEST": ()})

    def _each(self, entries: Sequence[str]) -> tuple["DatasetsConfig", ...]:
        named = (entry.partition(":") for entry in entries)
        return tuple(
            self.model_copy(
                update={"NAMES": plain_name(name), "ROOT_DIR": expanduser(root) or self.ROOT_DIR, "TEST": ()}
            )
            for name, _, root in named
        )


class DataloaderConfig(Section):
    """How batches are put together."""

    NUM_WORKERS: Annotated[int, Field(ge=0, le=512)] = 14  # decoding processes; 0: decode in the main process
    NUM_INSTANCE: PositiveInt = 16  # images per person in a batch
    BALANCE_SETS: Switch = False  # yes: equally many persons of each data set in a batch; the smaller sets repeat
    BACKEND: Literal["auto", "dali", "torchvision"] = "auto"  # what decodes; auto: DALI on a GPU, if it is installed
    AUGMENT: Literal["kernel", "dali"] = "kernel"  # what flips, crops and normalises where DALI decodes at every use
    CACHE: Literal["auto", "device", "host", "none"] = "auto"  # where decoded images stay; auto: where they fit
    SAMPLER: Annotated[str, "a batch is always persons x instances"] = "softmax_triplet"
