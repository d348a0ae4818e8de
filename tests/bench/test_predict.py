"""The model of a launch's time: what each part of the compiled code costs in it."""

import pytest

from bench.predict import GPUS, LATENCY_S, predicted_s, tensor_share, wait_depth, waiting_turns

LOOP = """
scf.for %first = %c{start} to %c{stop}_i32 step %c{step}_i32 : i32 {{
  %token = ttg.async_wait %copies {{num = {depth} : i32}}
"""


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("HGMMA.64x16x16.F32.BF16", 0.4),  # 8 clocks of products, 20 of reading 2,560 bytes
        ("HGMMA.64x32x16.F32.BF16", 2 / 3),
        ("HGMMA.64x64x16.F32.BF16", 1.0),
        ("HGMMA.64x16x16.F32.BF16 RS", 1.0),  # A is in registers
        ("HGMMA.64x128x8.F32.TF32", 0.5),
        ("IGMMA.64x128x32.S8.S8", 2.0),
        ("HMMA.16816.F32.BF16", 0.6),
    ],
)
def test_share_of_the_peak_that_tiles_leave_on_hopper(name: str, share: float) -> None:
    assert tensor_share({name: 3}, 90) == pytest.approx(share)


def test_a_mix_of_tiles_lies_between_them() -> None:
    assert 0.4 < tensor_share({"HGMMA.64x16x16.F32.BF16": 4, "HGMMA.64x64x16.F32.BF16": 1}, 90) < 1
    assert tensor_share({"HMMA.16816.F32.BF16": 1}, 80) == 1
    assert tensor_share({}, 90) < 0.1


def test_turns_that_wait_for_their_own_copies_count() -> None:
    waiting = LOOP.format(start=1, stop=211, step=32, depth=0)
    assert (waiting_turns(waiting), wait_depth(waiting)) == (7, 0)
    ahead = LOOP.format(start=0, stop=211, step=32, depth=4)
    assert (waiting_turns(ahead), wait_depth(ahead)) == (0, 4)
    assert (waiting_turns(waiting + ahead), wait_depth(waiting + ahead)) == (7, 4)
    assert waiting_turns(ahead + "ttg.async_wait {num = 0 : i32}") == 0  # the last copies, behind the loop
    assert waiting_turns(waiting.replace("%c211_i32", "%count")) == 1  # a number that the compiler does not know
    assert wait_depth("") is None


def test_the_larger_of_bytes_and_operations_and_then_waves_of_latency() -> None:
    gpu = GPUS[90]
    second = predicted_s(90, gpu.bytes_per_s, 0, 1, 1, 1, 0)
    assert second == pytest.approx(1 + LATENCY_S)
    assert predicted_s(90, gpu.bytes_per_s, gpu.operations_per_s, 0.5, 1, 1, 0) == pytest.approx(2 + LATENCY_S)
    waves = predicted_s(90, 0, 0, 1, 2 * gpu.multiprocessors + 1, 1, 3)
    assert waves == pytest.approx(3 * 4 * LATENCY_S)
    assert predicted_s(90, 0, 0, 1, 2 * gpu.multiprocessors + 1, 2, 3) == pytest.approx(2 * 4 * LATENCY_S)
