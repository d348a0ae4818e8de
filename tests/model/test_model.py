"""The whole model against the recorded numbers in double precision, every configuration file, and its edges."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fusionreid import FusionReID, Outputs, build_model
from fusionreid.config import ModelConfig
from fusionreid.engine.config import load_config
from fusionreid.losses import reid_loss
from fusionreid.weights import published_names
from tests import ROOT
from tests.numerics import assert_close
from tests.recorded import EXACT, STORED, assert_gradient_summary
from tests.recorded_model import RecordedRun, run_recorded, stage_module, tiny_model

CONFIGS = sorted((ROOT / "configs").rglob("*.yml"))
CASES = ["tiny_l1", "tiny_l2", "resnet50_only", "vitb_s12_only", "t2t14_r50_l2", "vitb_s12_r50_l2"]


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest) -> RecordedRun:
    return run_recorded(request.param)


def test_evaluation_equals_the_recorded_numbers(run: RecordedRun) -> None:
    for neck in ("before", "after"):
        recorded = run.arrays[f"eval_{neck}_f64"]
        assert_close(neck, run.evaluated.embedding(neck), recorded, EXACT)
        bounds = run.case.get("feat_slices", [0, recorded.shape[1]])
        assert len(run.evaluated.features) == len(bounds) - 1
        for part, (start, stop) in enumerate(pairwise(bounds), start=1):
            assert_close(f"part {part}", run.evaluated.embedding(neck, part), recorded[:, start:stop], EXACT)


def test_stages_equal_the_recorded_numbers(run: RecordedRun) -> None:
    for name, recorded in run.case["stages_f64"].items():
        stage = run.stages[stage_module(name, run.model)]
        assert stage.numel() == np.prod(recorded["shape"])
        assert_close(name, stage.flatten()[:: recorded["stride"]][:64], recorded["values"], EXACT)
        assert_close(f"norm of {name}", stage.norm(), recorded["l2"], EXACT)


def test_training_outputs_equal_the_recorded_numbers(run: RecordedRun) -> None:
    for head, (feature, logits) in enumerate(zip(run.trained.features, run.trained.logits)):
        assert_close(f"feature {head}", feature.detach(), run.arrays[f"train_feat_{head}_f64"], EXACT)
        assert_close(f"logits {head}", logits.detach(), run.arrays[f"train_score_{head}_f64"], EXACT)
    names = published_names(run.model)
    for name, buffer in run.model.named_buffers():
        recorded = run.case["buffers_after_train_f64"][names[name]]
        assert_close(name, [buffer.double().norm(), buffer.sum()], [recorded["l2"], recorded["sum"]], EXACT)


def test_losses_and_gradients_equal_the_recorded_numbers(run: RecordedRun) -> None:
    assert_losses_and_gradients(run, "soft", None)


@pytest.mark.parametrize("run", ["tiny_l1", "tiny_l2", "resnet50_only", *(
    pytest.param(name, marks=pytest.mark.sweep) for name in ("vitb_s12_only", "t2t14_r50_l2", "vitb_s12_r50_l2")
)], indirect=True)  # fmt: skip
def test_losses_and_gradients_with_a_margin_equal_the_recorded_numbers(run: RecordedRun) -> None:
    """The gradients differ from those without a margin in the loss alone, which the small models show."""
    assert_losses_and_gradients(run, "margin", 0.3)


def assert_losses_and_gradients(run: RecordedRun, kind: str, margin: float | None) -> None:
    loss = reid_loss(run.trained, run.persons, margin=margin)
    recorded = run.case[f"loss_{kind}_f64"]
    assert_close("total", loss.total.detach(), recorded["total"], EXACT)
    assert_close("identity", loss.identity.detach(), [head["id"] for head in recorded["heads"]], EXACT)
    assert_close("triplet", loss.triplet.detach(), [head["tri"] for head in recorded["heads"]], EXACT)
    parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss.total, parameters.values(), retain_graph=True)
    names = published_names(run.model)
    gradients = dict(zip((names[name] for name in parameters), found))
    for name, summary in run.case[f"grad_{kind}_f64"].items():
        assert_gradient_summary(name, gradients.get(name), summary)
        stored = f"grad_f64/{name}"
        if kind == "soft" and stored in run.arrays and summary[0] > EXACT:
            assert_close(name, gradients[name], run.arrays[stored], STORED)
    assert gradients.keys() <= run.case[f"grad_{kind}_f64"].keys()


@cache
def run_on_meta(config: ModelConfig, height: int = 256, width: int = 128) -> Outputs:
    with torch.device("meta"), torch.no_grad():
        model = build_model(config, image_size=(height, width), num_classes=10, num_cameras=3).eval()
        return model(torch.empty(2, 3, height, width), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds_and_runs_on_the_meta_device(path: Path) -> None:
    config = load_config(path)
    outputs = run_on_meta(config.MODEL, *config.INPUT.SIZE_TRAIN)
    assert len(outputs.logits) == (6 if config.MODEL.RES_USE and config.MODEL.TRANS_USE else 1)
    assert all(logits.shape == (2, 10) for logits in outputs.logits)
    assert outputs.embedding().shape == (2, sum(feature.shape[1] for feature in outputs.features))


@pytest.mark.parametrize(("kind", "width"), [("t2t_vit_t_24", 512), ("deit_small_patch16_224", 384)])
def test_narrow_transformers_fuse(kind: str, width: int) -> None:
    """The published code builds their refinement units for 768 channels and fails at the first forward."""
    config = ModelConfig(TRANSFORMER_TYPE=kind, STRIDE_SIZE=(14, 14), HTM_MODE=3)
    assert run_on_meta(config).embedding("after").shape == (2, 2048 + width + 4 * 768)


SETTINGS = {"DROP_PATH": 0.2, "DROP_OUT": 0.3, "ATT_DROP_RATE": 0.4, "SIE_COE": 2.0, "HTM_LAYER": 3, "HTM_MODE": 2}


@pytest.mark.parametrize("kind", ["test_vit", "t2t_vit_t_14"])
def test_settings_reach_their_parts(kind: str) -> None:
    config = ModelConfig(TRANSFORMER_TYPE=kind, RES_NAME="resnet18", LAST_STRIDE=2, SIE_CAMERA=False, **SETTINGS)
    with torch.device("meta"):
        model = build_model(config, image_size=(64, 32))
    vit, blocks = model.transformer, list(model.transformer.blocks)
    assert (vit.sie_embed, vit.sie_weight, vit.drop.p) == (None, 2.0, 0.3)
    assert {m.p for block in blocks for m in block.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert {block.attn.attention_dropout for block in blocks} == {0.4}
    assert blocks[-1].drop_path2.drop_prob == pytest.approx(0.2)
    assert [(len(layer.encoders), len(layer.fusions)) for layer in model.htm.layers] == [(0, 2)] * 3
    assert (model.cnn.name, model.cnn.last_stride) == ("resnet18", 2)


def test_neck_no_concerns_the_cnn_alone() -> None:
    outputs = run_on_meta(ModelConfig(NECK="no"))
    assert [n is f for n, f in zip(outputs.normed, outputs.features)] == [True, False, False, False, False, False]


T2T14 = {"TRANSFORMER_TYPE": "t2t_vit_t_14"}
IN_PAPER = [({}, 153.8), ({"RES_MODE": 2}, 172.8), ({"RES_MODE": 3}, 188.5), (T2T14, 89.0)]


@pytest.mark.parametrize(("settings", "millions"), IN_PAPER)
def test_parameter_count_is_that_of_the_paper(settings: dict[str, object], millions: float) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(**settings), num_classes=1041, num_cameras=15)
    assert model.num_parameters_in_paper // 100_000 / 10 == millions  # the figure cuts off after one digit


def test_meta_building_leaves_nothing_unfilled() -> None:
    with torch.device("meta"):
        model = tiny_model(1)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    model.reset_parameters()
    fresh = tiny_model(1).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        spread = [t.double().std(correction=0).item() for t in (tensor, fresh[name])]
        assert spread[0] == pytest.approx(spread[1], rel=0.4), name


def test_one_image_gives_what_it_gives_in_a_batch() -> None:
    model, images, cameras = tiny_model(2).double().eval(), torch.randn(3, 3, 64, 32).double(), torch.arange(3)
    together, alone = model(images, cameras), model(images[1:2], cameras[1:2])
    torch.testing.assert_close(alone.embedding(), together.embedding()[1:2])


def test_compiles_to_one_graph() -> None:
    model, images, cameras = tiny_model(1), torch.randn(2, 3, 64, 32), torch.zeros(2, dtype=torch.long)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(tuple(compiled.eval()(images, cameras)), tuple(model.eval()(images, cameras)))


def test_wrong_questions_are_named() -> None:
    outputs = tiny_model(1).eval()(torch.randn(1, 3, 64, 32), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="neck must be 'before' or 'after', got 'both'"):
        outputs.embedding("both")
    with pytest.raises(ValueError, match=r"part must be 0 \(all\) or 1 to 6 \(one head\), got 7"):
        outputs.embedding(part=7)
    with pytest.raises(ValueError, match="got neither"):
        FusionReID(None, None, num_classes=4)
