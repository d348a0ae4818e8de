import json
import math
import random

import numpy as np
import pytest
import torch

from fusionreid.dataloading.plan import epoch_plan, rectangle, total_steps
from fusionreid.dataloading.records import DataError
from tests.numerics import FIXTURES

SAMPLER = json.loads((FIXTURES / "modules/sampler.json").read_text())
ERASING = json.loads((FIXTURES / "modules/random_erasing.json").read_text())


def plan_of(labels, persons=4, instances=4, **changes):
    settings = {"seed": 1, "epoch": 0, "height": 256, "width": 128} | changes
    return epoch_plan(labels, persons_per_batch=persons, instances=instances, **settings)


def labels_of(case):
    return [label for label, count in case["counts"] for _ in range(count)]


@pytest.mark.parametrize("case", SAMPLER, ids=lambda case: f"{case['batch_size']}x{case['num_instances']}")
def test_sampling_has_the_published_statistics(case):
    labels, instances = np.array(labels_of(case)), case["num_instances"]
    persons = case["batch_size"] // instances
    counts, epochs = np.bincount(labels), 100
    lengths, uses = [], []
    for epoch in range(epochs):
        plan = plan_of(labels, persons, instances, epoch=epoch)
        lengths.append(len(plan.image))
        uses.append(np.bincount(labels[plan.image], minlength=len(counts)) / counts)
        blocks = labels[plan.image].reshape(plan.num_steps, persons, instances)
        assert (blocks == blocks[:, :, :1]).all()
        assert (np.diff(np.sort(blocks[:, :, 0])) > 0).all()
        fresh = plan.image[counts[labels[plan.image]] >= instances]
        assert len(set(fresh)) == len(fresh)  # no image twice, unless its person has too few
    yields = case["yielded"]["values"]
    chance = 4.5 * math.sqrt(1 / epochs + 1 / case["epochs"])  # deviations, each side a mean over its epochs
    assert min(yields) <= min(lengths)
    assert max(lengths) <= max(yields)
    assert abs(np.mean(lengths) - np.mean(yields)) <= chance * np.std(yields)
    theirs = np.bincount(labels, case["mean_use_per_image"]) / counts  # by person: one image alone is too noisy
    spread = np.std(uses, axis=0) + 0.1 * instances / counts  # a group left out in one epoch of a hundred
    assert (np.abs(np.mean(uses, axis=0) - theirs) <= chance * spread).all()


def test_scarce_persons_repeat_and_all_their_images_serve():
    labels = [0] + [1] * 3 + [2] * 8 + [3] * 4
    plans = [plan_of(labels, persons=2, epoch=epoch) for epoch in range(30)]
    use = sum(np.bincount(plan.image, minlength=len(labels)) for plan in plans)
    assert (use > 0).all()
    assert all(plan.num_steps >= 1 for plan in plans)


def test_every_order_and_every_image_is_equally_likely():
    labels = np.repeat(np.arange(6), 7)  # one group of 4 of 7 images each: 3 of 6 persons twice
    plans = [plan_of(labels, persons=3, epoch=epoch) for epoch in range(200)]
    assert {plan.num_steps for plan in plans} == {2}
    use = sum(np.bincount(plan.image, minlength=42) for plan in plans) / 200
    assert np.abs(use - 4 / 7).max() < 0.15
    first = np.bincount([labels[plan.image[0]] for plan in plans], minlength=6) / 200
    assert np.abs(first - 1 / 6).max() < 0.11


def test_a_plan_is_a_function_of_seed_and_epoch():
    labels = labels_of(SAMPLER[0])
    one, same = plan_of(labels), plan_of(labels)
    for field in ("image", "flip", "shift", "erase"):
        assert np.array_equal(getattr(one, field), getattr(same, field))
        for other in (plan_of(labels, seed=2), plan_of(labels, epoch=1)):
            assert not np.array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_have_the_same_batches(world_size):
    labels = np.array(labels_of(SAMPLER[0]))
    plan = plan_of(labels)
    slices = [plan.rank_slice(step, rank, world_size) for step in range(plan.num_steps) for rank in range(world_size)]
    assert np.array_equal(np.concatenate([plan.image[part] for part in slices]), plan.image)
    for part in slices:
        persons, counts = np.unique(labels[plan.image[part]], return_counts=True)
        assert len(persons) == 4 // world_size
        assert (counts == 4).all()


def test_rank_slice_refuses_what_it_cannot_divide():
    plan = plan_of(labels_of(SAMPLER[0]))
    with pytest.raises(ValueError, match="4 persons per batch must divide among the ranks, got rank 0 of 3"):
        plan.rank_slice(0, 0, 3)
    with pytest.raises(IndexError, match="step must lie in"):
        plan.rank_slice(plan.num_steps, 0, 1)


def test_too_few_persons():
    with pytest.raises(DataError, match=r"a batch of 4 persons needs as many .* got 3 persons"):
        plan_of([0, 1, 2] * 9)


def test_flip_shift_and_erase_follow_the_published_distribution():
    plan = plan_of(np.repeat(np.arange(1000), 16), persons=8, instances=16)
    count = len(plan.image)
    assert count == 16_000
    assert abs(plan.flip.mean() - 0.5) < 0.02
    for axis in range(2):
        values, counts = np.unique(plan.shift[:, axis], return_counts=True)
        assert values.tolist() == list(range(-10, 11))
        assert np.abs(counts / count - 1 / 21).max() < 0.008
    assert abs(np.corrcoef(plan.shift.T)[0, 1]) < 0.04
    top, left, rows, cols = plan.erase[plan.erase[:, 2] > 0].T
    assert abs(len(top) / count - 0.5) < 0.02
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + rows <= 256).all()
    assert (left + cols <= 128).all()
    area, aspect = rows * cols / (256 * 128), rows / cols
    assert abs(area.mean() - ERASING["area"]["mean"]) < 0.006
    for quantile, value in ERASING["area"]["quantiles"].items():
        assert abs(np.quantile(area, float(quantile)) - value) < 0.008
    for quantile, value in ERASING["aspect_h_over_w"].items():
        assert abs(np.quantile(aspect, float(quantile)) / value - 1) < 0.07
    assert abs((top / (256 - rows)).mean() - ERASING["relative_top_mean"]) < 0.02
    assert abs((left / (128 - cols)).mean() - ERASING["relative_left_mean"]) < 0.02
    none = plan_of(np.repeat(np.arange(8), 16), padding=0, flip_prob=0, erase_prob=0)
    assert np.count_nonzero(none.flip) + np.count_nonzero(none.shift) + np.count_nonzero(none.erase) == 0
    always = plan_of(np.repeat(np.arange(8), 16), flip_prob=1, erase_prob=1)
    assert always.flip.all()
    assert always.erase[:, 2].all()


def test_rectangles_as_recorded():
    """Given the recorded random numbers, our rule gives the recorded rectangles, up to the 2^-23 of our numbers."""
    for seed, expected in enumerate(ERASING["rectangles_for_python_random_seed_0_49"]):
        draw = random.Random(seed)
        if draw.random() > 0.5:
            assert expected is None
            continue
        fits = False
        while not fits:
            area, aspect = (torch.tensor([int(draw.random() * 2**32)]) for _ in range(2))
            _, _, rows, cols = (side.item() for side in rectangle((area, aspect, area, area), 256, 128))
            fits = rows < 256 and cols < 128
        top, left = draw.randint(0, 256 - rows), draw.randint(0, 128 - cols)
        assert [top, left, rows, cols] == expected


def test_the_steps_of_all_epochs_are_counted_though_epochs_differ():
    labels = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 40, 30))
    batch = {"persons_per_batch": 4, "instances": 4, "seed": 1}
    steps = [epoch_plan(labels, **batch, epoch=epoch, height=32, width=16).num_steps for epoch in range(1, 21)]
    assert len(set(steps)) > 1
    assert total_steps(labels, **batch, epochs=20) == sum(steps) != 20 * steps[0]
    assert total_steps(labels, **batch, epochs=10**6) == pytest.approx(10**6 * np.mean(steps), rel=0.01)
