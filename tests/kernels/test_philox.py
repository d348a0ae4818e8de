import pytest
import torch

from fusionreid.kernels.philox import WORD, below, philox, uniform


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD), (WORD, WORD, WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_the_authors(key, counter, expected):
    assert tuple(word.item() for word in philox(key, words(*counter))) == expected


def test_counter_words_broadcast():
    bits = philox((1, 2), (torch.arange(3)[:, None], torch.arange(4), 5, 6))
    assert all(word.shape == (3, 4) for word in bits)
    alone = philox((1, 2), words(2, 3, 5, 6))
    assert [word[2, 3].item() for word in bits] == [word.item() for word in alone]


@pytest.mark.parametrize("key", [(-1, 0), (0, WORD + 1)])
def test_a_key_beyond_32_bits_is_refused(key):
    with pytest.raises(ValueError, match="seed and epoch must lie in"):
        philox(key, words(0, 0, 0, 0))


def test_uniform_is_open_and_exact():
    ends = uniform(torch.tensor([0, WORD]))
    assert ends.dtype == torch.float32
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24]


def test_below_reaches_every_number_equally():
    bits = philox((3, 0), (torch.arange(210_000), 0, 0, 1))[0]
    counts = torch.bincount(below(bits, 21), minlength=21)
    assert len(counts) == 21
    assert (counts - 10_000).abs().max() < 500  # five deviations
    assert below(torch.tensor([0, WORD]), 21).tolist() == [0, 20]
