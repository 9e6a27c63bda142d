"""Numbers that are none are found wherever they stand."""

import pytest
import torch

from castlora.finite import is_finite

FLOATS = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_anywhere_is_found(dtype, number):
    for size in (1, 3, 17, 1000):
        for place in (0, size // 2, size - 1):
            numbers = torch.linspace(-2, 2, size)
            assert is_finite(numbers.to(dtype))
            numbers[place] = number
            assert not is_finite(numbers.to(dtype)), (size, place)


def test_other_tensors_are_read_too():
    assert is_finite(torch.empty(0, 3)) and is_finite(torch.tensor([1, 2])) and is_finite(torch.tensor(True))
    assert is_finite(torch.tensor(1.0)) and not is_finite(torch.tensor(torch.nan))
    assert is_finite(torch.tensor(1j)) and not is_finite(torch.tensor(complex(0, torch.inf)))
