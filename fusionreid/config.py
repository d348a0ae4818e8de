"""The MODEL section of the configuration: published keys, published defaults, and what they may hold."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from fusionreid.schema import PathText, Section, Switch, Text

Rate = Annotated[float, Field(ge=0, lt=1)]  # share that is dropped


def _no(value: Any) -> Any:
    return "no" if value is False else value  # a bare `no` in YAML


class ModelConfig(Section):
    """What is built, with which weights it starts, and what its loss is made of."""

    DEVICE: Literal["cuda", "cpu"] = "cuda"  # cuda falls back to cpu where there is no GPU
    LAST_STRIDE: Literal[1, 2] = 1  # stride of the CNN's last stage; 1 doubles the feature map
    PRETRAIN_CHOICE: Literal["imagenet", "checkpoint", "none"] = "imagenet"  # checkpoint: fine-tune; none: random start
    PRETRAIN_PATH: PathText = ""  # where PRETRAIN_CHOICE is checkpoint: a checkpoint folder or a published .pth file
    PRETRAIN_PATH_R: PathText = "your CNN pretrained model path"  # of the CNN: a weight file, a timm name, auto or none
    PRETRAIN_PATH_T: PathText = "your Transformer pretrained model path"  # of the Transformer
    RES_USE: Switch = True  # the CNN branch; the HTMs need both branches
    TRANS_USE: Switch = True  # the Transformer branch
    RES_MODE: Literal[1, 2, 3] = 1  # ResNet-50, ResNet-101, ResNet-152
    RES_NAME: str = ""  # resnet50_ibn_a, resnet101_ibn_a or any timm CNN, in place of RES_MODE
    TRANSFORMER_TYPE: Text = "vit_base_patch16_224"  # a published name or any timm ViT or Eva
    STRIDE_SIZE: tuple[PositiveInt, PositiveInt] = (12, 12)  # height, width in pixels between two patches
    HTM_LAYER: Annotated[int, Field(ge=1, le=48)] = 2  # number of HTM layers
    MIX_DIM: Annotated[int, Field(gt=0, multiple_of=12)] = 768  # width of the HTMs, which have 12 heads
    HTM_SHARE: Literal["encoder", "none", "fusion", "all"] = "encoder"  # weights common to both streams; paper: encoder
    HTM_MODE: Literal[0, 1, 2, 3] = 0  # 0: encode, then fuse; 1: encode; 2: fuse; 3: fuse, then encode
    DROP_PATH: Rate = 0.1  # stochastic depth of the Transformer's last block, growing linearly up to it
    DROP_OUT: Rate = 0.0  # dropout in the Transformer
    ATT_DROP_RATE: Rate = 0.0  # dropout of the Transformer's attention weights
    SIE_CAMERA: Switch = True  # side information: a learnt embedding per camera
    SIE_COE: float = 3.0  # factor of that embedding
    NECK: Annotated[Literal["bnneck", "no"], BeforeValidator(_no)] = "bnneck"  # batch norm before the CNN's classifier
    IF_LABELSMOOTH: Switch = True  # label smoothing 0.1 in the identity loss
    ID_LOSS_TYPE: Literal["softmax", "cosface", "arcface"] = "softmax"  # the others: cosines with a margin and a scale
    ID_LOSS_WEIGHT: NonNegativeFloat = 1.0  # weight of the identity loss
    METRIC_LOSS_TYPE: Literal["triplet", "unit_triplet"] = "triplet"  # unit_triplet: of features at unit length
    TRIPLET_LOSS_WEIGHT: NonNegativeFloat = 1.0  # weight of the triplet loss
    NO_MARGIN: Switch = True  # soft-margin triplet loss; no: SOLVER.MARGIN
    IF_WITH_CENTER: Switch = False  # adds the center loss, SOLVER.CENTER_LOSS_WEIGHT

    NAME: Annotated[str, "the model is FusionReID"] = "FusionReID"
    DEVICE_ID: Annotated[str, Field(strict=False, coerce_numbers_to_str=True), "set CUDA_VISIBLE_DEVICES"] = "0"
    DIST_TRAIN: Annotated[Switch, "torchrun decides how many processes train"] = False
    SIE_VIEW: Annotated[Switch, "no data set here labels the view"] = False

    @model_validator(mode="after")
    def _has_a_branch(self) -> Self:
        if not (self.RES_USE or self.TRANS_USE):
            rule = "must be yes where TRANS_USE is no: no branch is left"
            raise PydanticCustomError("contradiction", rule, {"keys": ("RES_USE", "TRANS_USE")})
        return self
