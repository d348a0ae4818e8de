"""The training loss: recorded identity, triplet and center losses, their weighted sum, and the corners of each."""

import math
from types import SimpleNamespace

import pytest
import torch

from fusionreid.losses import HEADS, CenterLoss, CosineMargin, head_names, reid_loss
from tests.numerics import assert_close, entry_value, load_case

META, RECORDED = load_case("modules/losses")
PERSONS = torch.from_numpy(RECORDED["in/labels"])


def outputs(dtype: torch.dtype = torch.float64, heads: int = 1) -> SimpleNamespace:
    score, feature = (torch.from_numpy(RECORDED[f"in/{name}"]).to(dtype).requires_grad_() for name in ("score", "feat"))
    return SimpleNamespace(logits=(score,) * heads, features=(feature,) * heads)


@pytest.mark.parametrize(
    ("name", "smoothing"), [("label_smooth_0.1", 0.1), ("label_smooth_0.25", 0.25), ("cross_entropy", 0.0)]
)
def test_identity_loss_matches_the_recorded_one(name: str, smoothing: float) -> None:
    out = outputs()
    parts = reid_loss(out, PERSONS, label_smoothing=smoothing, triplet_weight=0.0)
    parts.total.backward()
    assert_close(name, parts.identity[0].detach(), RECORDED[f"f64/{name}"], 1e-9)
    assert_close(f"{name} gradient", out.logits[0].grad, RECORDED[f"f64/{name}_grad"], 1e-9)


@pytest.mark.parametrize(("smooth", "smoothing"), [("on", 0.1), ("off", 0.0)])
@pytest.mark.parametrize(("kind", "margin"), [("soft", None), ("margin", 0.3)])
def test_weighted_sum_matches_the_recorded_one(smooth: str, smoothing: float, kind: str, margin: float | None) -> None:
    weights = {"id_weight": META["weights"]["id"], "triplet_weight": META["weights"]["triplet"]}
    for dtype, tag, relative in ((torch.float64, "f64", 1e-9), (torch.float32, "f32", 1e-6)):
        parts = reid_loss(outputs(dtype), PERSONS, margin=margin, label_smoothing=smoothing, **weights)
        assert_close("total", parts.total.detach(), RECORDED[f"{tag}/built_{smooth}_{kind}"], relative)
        assert parts.total.dtype == dtype


def test_unit_triplets_do_not_depend_on_lengths() -> None:
    out, shorter = outputs(), outputs()
    lengths = out.features[0].detach().norm(dim=1, keepdim=True)
    shorter.features = (out.features[0] / lengths,)
    losses = [reid_loss(o, PERSONS, unit_features=True, margin=0.3).triplet.detach() for o in (out, shorter)]
    assert_close("lengths", *losses, 1e-12)
    assert_close("of unit vectors", losses[0], reid_loss(shorter, PERSONS, margin=0.3).triplet.detach(), 1e-12)


def test_center_loss_matches_the_recorded_one_and_enters_by_its_weight() -> None:
    out = outputs()
    center = CenterLoss(16, 32).double()
    center.load_state_dict({"centers": torch.from_numpy(entry_value("centers", (16, 32)))})
    parts = reid_loss(out, PERSONS, id_weight=0.0, triplet_weight=0.0, center_loss=center, center_weight=0.5)
    (2 * parts.total).backward()
    assert_close("center", parts.center.detach(), RECORDED["f64/center"], 1e-9)
    assert_close("gradient", out.features[0].grad, RECORDED["f64/center_grad"], 1e-9)
    assert_close("gradient of centers", center.centers.grad, RECORDED["f64/center_grad_centers"], 1e-9)
    assert_close("at its own center", center(center.centers[PERSONS], PERSONS), 1e-12, 1e-9)


def test_the_total_is_the_sum_over_heads() -> None:
    parts = reid_loss(outputs(heads=6), PERSONS)
    assert parts.identity.shape == parts.triplet.shape == (6,)
    torch.testing.assert_close(parts.total, parts.identity.sum() + parts.triplet.sum())
    assert parts.center == 0


@pytest.mark.parametrize("unit_features", [False, True])
def test_half_precision_outputs_give_an_fp32_loss_under_autocast(unit_features: bool) -> None:
    out = outputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = reid_loss(out, PERSONS, unit_features=unit_features, center_loss=CenterLoss(16, 32))
    assert {part.dtype for part in parts} == {torch.float32}
    exact = SimpleNamespace(logits=(out.logits[0].double(),), features=(out.features[0].double(),))
    for kind in ("identity", "triplet"):
        low, gold = (getattr(p, kind).detach() for p in (parts, reid_loss(exact, PERSONS, unit_features=unit_features)))
        assert_close(kind, low, gold, 1e-6)


def test_a_bad_head_shows_in_its_own_place() -> None:
    out = outputs(heads=6)
    spoiled = (*out.features[:4], out.features[4] * float("nan"), out.features[5])
    parts = reid_loss(SimpleNamespace(logits=out.logits, features=spoiled), PERSONS)
    bad = [head for head, loss in zip(HEADS, parts.triplet) if not loss.isfinite()]
    assert bad == ["htm_res"]
    assert parts.identity.isfinite().all()
    assert not parts.total.isfinite()


def test_head_names() -> None:
    assert head_names(True, True) == HEADS
    assert (head_names(True, False), head_names(False, True)) == (("resnet",), ("transformer",))


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_a_margin_makes_the_own_person_harder(kind: str) -> None:
    margin, scale, persons = 0.4, 20.0, torch.tensor([2, 0, 1])
    cosines = torch.tensor([[0.1, -0.5, 0.8], [-0.3, 0.9, 0.2], [0.7, -0.99, 0.4]], dtype=torch.double)
    logits = CosineMargin(kind, margin, scale)(cosines, persons)
    expected = scale * cosines
    for row, person in enumerate(persons.tolist()):
        angle = math.acos(cosines[row, person])
        turned = math.cos(angle + margin) if angle + margin < math.pi else math.cos(angle) - margin * math.sin(margin)
        expected[row, person] = scale * (cosines[row, person] - margin if kind == "cosface" else turned)
    torch.testing.assert_close(logits, expected)
    assert (logits <= scale * cosines).all()


def test_a_margin_bears_cosines_of_one_in_half_precision() -> None:
    cosines = torch.tensor([[1.0, -1.0], [1.0, -1.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = CosineMargin("arcface", 0.5, 30.0)(cosines, torch.tensor([0, 1])).sum()
    loss.backward()
    assert loss.dtype == torch.float32
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()
