import pytest
import torch

from fusionreid.kernels import _path, augment, reference
from fusionreid.kernels.augmentation import SPARE, erase_rectangles, normalize

SETTINGS = {"seed": 1111, "epoch": 3, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}


@pytest.fixture(params=["plain", "kernel"], autouse=True)
def _both_paths(request: pytest.FixtureRequest) -> None:
    """Every test runs on both paths."""
    if request.param == "kernel":
        request.getfixturevalue("triton_path")


def batch(size: int, height: int = 24, width: int = 11, reach: int = 6) -> dict[str, torch.Tensor]:
    top, left = torch.randint(0, height, (size,)), torch.randint(0, width, (size,))
    rows = torch.randint(0, 2, (size,)) * torch.randint(1, height, (size,)).minimum(height - top)
    cols = torch.randint(1, width, (size,)).minimum(width - left)
    return {
        "images": torch.randint(0, 256, (size, height, width, 3), dtype=torch.uint8),
        "flip": torch.rand(size) < 0.5,
        "shift": torch.randint(-reach, reach + 1, (size, 2)),
        "erase": torch.stack((top, left, rows, cols), dim=1).int(),
        "index": torch.randint(0, 100_000, (size,)),
    }


def first(inputs: dict[str, torch.Tensor], **changes: object) -> dict[str, object]:
    return {name: tensor[:1] for name, tensor in inputs.items()} | changes


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-7), (torch.float32, 2e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 33])
def test_as_the_reference(dtype, error, size):
    inputs = batch(size)
    out = augment(**inputs, dtype=dtype, **SETTINGS)
    expected = reference.augment(**inputs, dtype=torch.float64, **SETTINGS)
    assert out.dtype == dtype
    assert out.shape == (size, 3, 24, 11)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ((out.double() - expected).abs() <= error * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize(("height", "width"), [(64, 128), (33, 43), (40, 86), (7, 3)])
def test_images_larger_and_smaller_than_a_program(height, width):
    inputs = batch(5, height, width, reach=min(height, width, 6))
    inputs["erase"][:3] = torch.tensor([[0, 0, height, width], [height // 2, 1, 1, 1], [1, width // 2, height - 2, 1]])
    difference = augment(**inputs, **SETTINGS) - reference.augment(**inputs, **SETTINGS)
    assert difference.abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rectangles_erased_afterwards_are_the_same(dtype):
    inputs = batch(9, 40, 50)
    inputs["erase"][:2] = torch.tensor([[0, 0, 40, 50], [39, 49, 1, 1]])
    expected = augment(**inputs, dtype=dtype, **SETTINGS)
    out = augment(**inputs | {"erase": torch.zeros_like(inputs["erase"])}, dtype=dtype, **SETTINGS)
    place = {"seed": SETTINGS["seed"], "epoch": SETTINGS["epoch"]}
    apart = [torch.stack((x, x), -1)[..., 0] for x in (inputs["erase"], inputs["index"])]
    assert erase_rectangles(out, *apart, **place) is out
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"images must be floating \(B, 3, H, W\), channels-last"):
        erase_rectangles(out.contiguous(), inputs["erase"], inputs["index"], **place)
    with pytest.raises(ValueError, match=r"erase must be \(9, 4\)"):
        erase_rectangles(out, inputs["erase"][:8], inputs["index"], **place)


def test_rows_of_more_images():
    inputs = batch(6)
    inputs["rows"] = torch.tensor([5, 0, 0, 3, 4, 1])
    few = {name: tensor if name == "images" else tensor[:4] for name, tensor in inputs.items()}
    out = augment(**few, **SETTINGS)
    gathered = few | {"images": few["images"][few.pop("rows")]}
    assert torch.equal(out, augment(**{k: v for k, v in gathered.items() if k != "rows"}, **SETTINGS))
    assert (out - reference.augment(**inputs, **SETTINGS)[:4]).abs().max() < 2e-6


def test_parameters_may_be_strided():
    inputs = batch(5)
    inputs["erase"][:] = torch.tensor([2, 3, 10, 5])
    inputs["rows"] = torch.tensor([4, 0, 3, 3, 1])
    strided = {name: torch.stack((tensor, tensor.flip(0)), dim=-1)[..., 0] for name, tensor in inputs.items()}
    strided["images"] = inputs["images"].mT.contiguous().mT
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert torch.equal(augment(**strided, **SETTINGS), augment(**inputs, **SETTINGS))


@pytest.mark.parametrize("row", [-1, 2, 2**40])
def test_a_row_that_does_not_exist_is_no_image(row):
    inputs = first(batch(2)) | {"images": torch.full((2, 24, 11, 3), 9, dtype=torch.uint8), "rows": torch.tensor([row])}
    if _path.triton_on_cpu or torch.cuda.is_available():
        assert augment(**inputs, **SETTINGS).isnan().all()
    else:
        with pytest.raises(ValueError, match=r"augment: rows must lie in 0\.\.1, got"):
            augment(**inputs, **SETTINGS)


def test_memory_serves_again_only_once_nothing_refers_to_it():
    if _path.triton_on_cpu or torch.cuda.is_available():
        pytest.skip("the allocator of a GPU does this")
    inputs = batch(4, 256, 128)  # 1.5 MiB
    SPARE.clear()
    kept = augment(**inputs, **SETTINGS)
    expected, part = kept.clone(), kept[1, :, 2:]
    other = augment(**inputs, **SETTINGS)
    assert kept.data_ptr() != other.data_ptr()
    address = kept.data_ptr()
    kept.fill_(torch.nan)
    del kept
    assert not SPARE
    assert augment(**inputs, **SETTINGS).data_ptr() not in (address, other.data_ptr())
    del part, other
    again = [augment(**inputs, **SETTINGS) for _ in range(3)]
    assert address in [images.data_ptr() for images in again]
    assert all(torch.equal(images, expected) for images in again)


def test_geometry_pixel_by_pixel():
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 2, 2, 3)
    shift = torch.tensor([[1, -1]])  # the source is one row below and one column to the left
    none, zero = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    plain = {"seed": 0, "epoch": 0, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
    out = augment(image, torch.tensor([False]), shift, none, zero, **plain)
    assert out[0].permute(1, 2, 0).round().tolist() == [[[0, 0, 0], [6, 7, 8]], [[0, 0, 0], [0, 0, 0]]]
    out = augment(image, torch.tensor([True]), shift, none, zero, **plain)
    assert out[0].permute(1, 2, 0).round().tolist() == [[[0, 0, 0], [9, 10, 11]], [[0, 0, 0], [0, 0, 0]]]


def test_black_border_is_black_before_normalisation():
    inputs = first(batch(1), shift=torch.tensor([[24, 11]]), erase=torch.zeros(1, 4, dtype=torch.int32))
    out = augment(**inputs, seed=0, epoch=0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert (out == -1).all()


def test_noise_depends_on_seed_epoch_and_position_only():
    inputs = batch(6)
    inputs["erase"][:] = torch.tensor([2, 3, 10, 5])
    out = augment(**inputs, **SETTINGS)
    reversed_out = augment(**{name: tensor.flip(0) for name, tensor in inputs.items()}, **SETTINGS)
    assert torch.equal(reversed_out.flip(0), out)
    assert not torch.equal(augment(**inputs, **(SETTINGS | {"epoch": 4}))[:, :, 2:12, 3:8], out[:, :, 2:12, 3:8])


def test_normalize():
    images = torch.randint(0, 256, (3, 5, 4, 3), dtype=torch.uint8)
    out = normalize(images, SETTINGS["mean"], SETTINGS["std"], torch.float64)
    mean, std = (torch.tensor(SETTINGS[name], dtype=torch.float64) for name in ("mean", "std"))
    expected = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert (out - expected).abs().max() < 1e-14
    assert normalize(images[:0], SETTINGS["mean"], SETTINGS["std"]).shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(1, 3, 4, 4)}, "must be \\(N, H, W, 3\\) uint8, got \\(1, 3, 4, 4\\) torch.float32"),
        ({"flip": torch.zeros(2, dtype=torch.bool)}, "flip must be \\(1,\\)"),
        ({"flip": torch.zeros(1, dtype=torch.int64)}, "flip must be bool"),
        ({"shift": torch.zeros(1, 2)}, "shift must be \\(1, 2\\) whole numbers"),
        ({"erase": torch.zeros(1, 3, dtype=torch.int64)}, "erase must be \\(1, 4\\)"),
        ({"index": torch.zeros(1, dtype=torch.int32)}, "index must be int64"),
        ({"rows": torch.zeros(1)}, "rows must be \\(1,\\) whole numbers"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "flip must be \\(2,\\)"),
        ({"std": (0.5, 0.5)}, "mean and std must be three numbers each"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"std": (0.5, 0.5, float("nan"))}, "all of them finite"),
        ({"mean": (0.5, 0.5, float("inf"))}, "all of them finite"),
        ({"dtype": torch.uint8}, "dtype must be floating, got torch.uint8"),
        ({"seed": -1}, "seed and epoch"),
    ],
)
def test_wrong_input(changes, message):
    inputs = first(batch(1), erase=torch.tensor([[0, 0, 2, 2]])) | SETTINGS | changes
    with pytest.raises(ValueError, match=message):
        augment(**inputs)
