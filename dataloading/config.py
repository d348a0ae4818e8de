"""The INPUT, DATASETS and DATALOADER sections of the configuration."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from fusionreid.schema import FolderText, Probability, Section, Text

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


def _only(value: Any) -> Any:
    """Take the name out of a list of one, as other trainers write it."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


DataSetName = Annotated[Text, BeforeValidator(_only)]


class DatasetsConfig(Section):
    """Which data set, and where it lies."""

    NAMES: DataSetName = "msmt17"  # market1501, dukemtmc, msmt17; own data: folder, market, csv; or synthetic
    ROOT_DIR: FolderText = "./data"  # folder that holds the data set
    ON_BAD: Literal["error", "skip"] = "error"  # an image file that cannot be used; skip: up to one in a thousand
    SYNTHETIC: SyntheticConfig = SyntheticConfig()


class DataloaderConfig(Section):
    """How batches are put together."""

    NUM_WORKERS: Annotated[int, Field(ge=0, le=512)] = 14  # decoding processes; 0: decode in the main process
    NUM_INSTANCE: PositiveInt = 16  # images per person in a batch
    BACKEND: Literal["auto", "dali", "torchvision"] = "auto"  # what decodes; auto: DALI on a GPU, if it is installed
    AUGMENT: Literal["kernel", "dali"] = "kernel"  # what flips, crops and normalises where DALI decodes at every use
    CACHE: Literal["auto", "device", "host", "none"] = "auto"  # where decoded images stay; auto: where they fit
    SAMPLER: Annotated[str, "a batch is always persons x instances"] = "softmax_triplet"
