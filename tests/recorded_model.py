"""The recorded models with their made-up weights, and one recorded run of each, in double precision."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fusionreid import FusionReID, Outputs, build_model
from fusionreid.backbones.resnet import ResNet
from fusionreid.backbones.vit import from_timm
from fusionreid.config import ModelConfig
from fusionreid.weights import published_names
from tests.numerics import load_case
from tests.recorded import fill

STAGES = {  # a recorded stage -> the module of ours that gives it
    "resnet.base.": "cnn.",
    "resnet.gap": "cnn_pool",
    "transformer.base.": "transformer.",
    "tokens_to_token": "patch_embed",
    "res_LRU": "cnn_lru",
    "former_LRU": "transformer_lru",
    "gap_r": "cnn_lru_pool",
    "gap_f": "transformer_lru_pool",
    "HTM.blocks": "htm.layers",
    "SEU1": "encoders.0.norm",
    "SEU2": "encoders.1.norm",
    ".MUF_RES": "[0]",  # a layer's answer is that of its fusion units
    ".MFU_FORMER": "[1]",
}


def stage_module(stage: str, model: FusionReID) -> str:
    if model.cnn is None or model.transformer is None:
        stage = f"{'resnet' if model.transformer is None else 'transformer'}.{stage}"
    for theirs, ours in STAGES.items():
        stage = stage.replace(theirs, ours)
    return stage


def tiny_model(layers: int, **options: Any) -> FusionReID:
    """The recorded tiny composition, for images of 64 x 32."""
    source = VisionTransformer(embed_dim=96, depth=2, num_heads=4, num_classes=0)
    vit = from_timm(source, image_size=(64, 32), stride=(12, 12), num_cameras=6)
    return FusionReID(ResNet((1, 1, 1, 1)), vit, num_classes=16, width=96, layers=layers, **options)


def recorded_model(name: str) -> FusionReID:
    """One of the recorded models, with the made-up weights."""
    with torch.device("meta"):
        if name.startswith("tiny"):
            model = tiny_model(int(name[-1]), share="none")
        else:
            sides = {"RES_USE": name != "vitb_s12_only", "TRANS_USE": name != "resnet50_only"}
            kind = "t2t_vit_t_14" if name.startswith("t2t") else "vit_base_patch16_224"
            config = ModelConfig(DROP_PATH=0.0, HTM_SHARE="none", TRANSFORMER_TYPE=kind, **sides)
            model = build_model(config, num_classes=16)
    model.to_empty(device="cpu")
    fixed = {}
    if name.startswith("t2t"):  # the sinusoid table keeps its value
        model.transformer.reset_parameters()
        fixed = {"transformer.pos_embed": model.transformer.pos_embed.detach().clone()}
    fill(model, published_names(model).__getitem__)
    model.load_state_dict(fixed, strict=False)
    return model


@dataclass
class RecordedRun:
    """What was recorded, and the same of ours: evaluation of two images, then one training forward of all."""

    case: dict[str, Any]
    arrays: dict[str, np.ndarray]
    model: FusionReID
    persons: Tensor
    stages: dict[str, Tensor]  # of the evaluation, by module
    evaluated: Outputs
    trained: Outputs


def run_recorded(name: str) -> RecordedRun:
    case, arrays = load_case(f"models/{name}")
    model, rng = recorded_model(name), np.random.Generator(np.random.PCG64(case["image_seed"]))
    images = torch.from_numpy(rng.standard_normal(case["image_shape"], dtype=np.float32)).double()
    cameras, stages = torch.tensor(case["cameras"]), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            if isinstance(output, tuple):
                stages.update({f"{name}[{i}]": part for i, part in enumerate(output)})
            else:
                stages[name] = output

        return hook

    wanted = {stage_module(stage, model).partition("[")[0] for stage in case["stages_f64"]}
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in wanted]
    with torch.no_grad():
        evaluated = model.eval()(images[:2], cameras[:2])
    for hook in hooks:
        hook.remove()
    trained = model.train()(images, cameras)
    return RecordedRun(case, arrays, model, torch.tensor(case["labels"]), stages, evaluated, trained)
