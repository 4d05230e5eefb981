"""The checks of the tests: the first calls of everything, in every test."""

import pytest
import torch

from itda import InputError, normalize
from tests import checked


@pytest.mark.parametrize("_", range(2))  # the second is checked as the first was
def test_the_first_calls_of_each_test_are_checked(_):
    with pytest.raises(Exception, match="Type-check error"):
        normalize("no tensor")
    for _ in range(checked.FIRST):
        normalize(torch.ones(2, 3))
    with pytest.raises(InputError):  # the function's own
        normalize("no tensor")
