"""The CNN branch: ResNet-50/101/152 with the published changes, also as IBN-a, or any timm CNN by name.

Source: He et al., arXiv:1512.03385; last stride 1: Luo et al., Bag of Tricks, arXiv:1903.07071; IBN-a: Pan et al.,
Two at Once, arXiv:1807.09441.
"""

import logging

import timm
import torch
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from fusionreid.backbones import BackboneError

LAYERS = {1: (3, 4, 6, 3), 2: (3, 4, 23, 3), 3: (3, 8, 36, 3)}  # RES_MODE -> blocks per stage: ResNet-50, 101, 152
IBN = {"resnet50_ibn_a": 1, "resnet101_ibn_a": 2}  # RES_NAME -> RES_MODE

log = logging.getLogger(__name__)


class InstanceBatchNorm(nn.Module):
    """Normalisation of half the channels per image, of the others over the batch; entries are named as in IBN-Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map (B, C, h, w)."""
        instance, batch = x.split((self.IN.num_features, self.BN.num_features), 1)
        return torch.cat((self.IN(instance), self.BN(batch)), 1)


class ResNet(TimmResNet):
    """Bottleneck ResNet whose stem has no activation and a 2x2 pool: images (B, 3, H, W) -> map (B, C, h, w).

    With `ibn` the first norm of every block is an `InstanceBatchNorm`, except in the last stage.
    """

    def __init__(self, layers: tuple[int, int, int, int], last_stride: int = 1, *, ibn: bool = False) -> None:
        super().__init__(Bottleneck, layers, num_classes=0, global_pool="", zero_init_last=False)
        self.act1 = nn.Identity()
        self.maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
        for block in (*self.layer1, *self.layer2, *self.layer3) if ibn else ():
            block.bn1 = InstanceBatchNorm(block.bn1.num_features)
        first = self.layer4[0]
        for conv in (first.conv2, first.downsample[0]):
            conv.stride = (last_stride, last_stride)
        self.width: int = self.num_features

    def reset_parameters(self) -> None:
        """Start as He et al. do; the published code leaves torch's start, and loads weights over it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
                module.reset_parameters()


class TimmCNN(nn.Module):
    """Any timm CNN, its own stem untouched: images (B, 3, H, W) -> the last stage's map (B, C, h, w).

    With `last_stride` 1 the last stage keeps its input's resolution where that is well defined; `last_stride` then says
    what came of it.
    """

    def __init__(self, name: str, last_stride: int = 1) -> None:
        super().__init__()
        self.name = name
        self.body = _create(name)
        self.width: int = self.body.num_features
        with torch.device("meta"):
            probe = _create(name)
        height, width = _map_size(name, probe, self.width)
        self.last_stride = 2
        if last_stride == 1:
            try:
                doubled = (2 * height, 2 * width)
                removable = _remove_last_stride(probe) and _map_size(name, probe, self.width) == doubled
            except RuntimeError:  # a shortcut of another shape
                removable = False
            if removable:
                _remove_last_stride(self.body)
                self.last_stride = 1
            else:
                log.warning("%s: the stride of its last stage cannot be removed, LAST_STRIDE 1 has no effect", name)

    def reset_parameters(self) -> None:
        """Start as timm does, whatever device the weights are on."""
        with torch.device("cpu"):
            fresh = _create(self.name)
        self.body.load_state_dict(fresh.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        """Return the map (B, C, h, w) of images (B, 3, H, W)."""
        return self.body.forward_features(images)


def _create(name: str) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, global_pool="")
    except (RuntimeError, TypeError, AssertionError) as error:
        raise BackboneError(
            f"TimmCNN: RES_NAME must be one of {', '.join(IBN)} or a CNN that timm {timm.__version__} knows, got "
            f"{name!r}: {error}"
        ) from error


def _map_size(name: str, model: nn.Module, width: int) -> tuple[int, int]:
    """Height and width of the map of a 256x256 image; the model is on the meta device."""
    try:
        features = model.eval().forward_features(torch.empty(1, 3, 256, 256, device="meta"))
    except AssertionError as error:
        raise BackboneError(f"TimmCNN: RES_NAME must take images of any size, {name!r} says: {error}") from error
    if features.ndim != 4 or features.shape[1] != width:
        raise BackboneError(
            f"TimmCNN: RES_NAME must give a map (B, {width}, h, w), {name!r} gives {tuple(features.shape)}"
        )
    return features.shape[2], features.shape[3]


def _remove_last_stride(model: nn.Module) -> bool:
    """Stride 1 for the layers of the last stage that then stay aligned with their input; False if there is none.

    The last stage of a MobileNet or EfficientNet is two modules of one resolution, of which the first is strided.
    """
    parent, _, number = model.feature_info[-1]["module"].rpartition(".")
    siblings = model.get_submodule(parent)
    stages = siblings[: int(number) + 1] if number.isdigit() else [siblings.get_submodule(number)]
    strided = [stage for stage in stages if any(getattr(x, "stride", 1) in (2, (2, 2)) for x in stage.modules())]
    changed = False
    for layer in strided[-1].modules() if strided else ():
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) and layer.kernel_size[0] % 2 == 1:
            layer.stride, changed = (1, 1), True
        elif isinstance(layer, nn.AvgPool2d) and layer.kernel_size == layer.stride == 2:
            layer.kernel_size, layer.stride, changed = 1, 1, True
    return changed


def build_cnn(mode: int = 1, name: str = "", *, last_stride: int = 1) -> ResNet | TimmCNN:
    """Build ResNet-50, 101 or 152 (RES_MODE 1, 2, 3), or by `name` one of `IBN` or any timm CNN."""
    if name in IBN:
        return ResNet(LAYERS[IBN[name]], last_stride, ibn=True)
    return TimmCNN(name, last_stride) if name else ResNet(LAYERS[mode], last_stride)
