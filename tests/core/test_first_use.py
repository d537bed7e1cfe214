"""A kernel is used only where it has been seen to work."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_brain.core.first_use import largest_gap, working, works_here


def test_a_kernel_that_fails_or_computes_something_else_is_not_used_and_a_warning_says_why(recwarn):
    def failing() -> str | None:
        raise RuntimeError("out of resources")

    assert works_here(lambda: None, "products") and not recwarn.list
    with pytest.warns(UserWarning, match=r"^products: it does not run here: RuntimeError\('out of resources'\)"):
        assert not works_here(failing, "products")
    with pytest.warns(UserWarning, match="^products: it is 0.3 away"):
        assert not works_here(lambda: "it is 0.3 away", "products")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_tried_with_its_gradients_where_the_first_use_has_none(mode):
    def problem() -> str | None:
        leaf = torch.ones(2, requires_grad=True)
        leaf.square().sum().backward()
        return None if leaf.grad.tolist() == [2, 2] else "wrong"

    with mode():
        assert works_here(problem, "products")


def test_modules_of_kernels_that_cannot_be_imported():
    assert working("math", lambda found: None if found is math else "another", "products") is math
    with pytest.warns(UserWarning, match="^products: it does not run here: ModuleNotFoundError"):
        assert working("no_such_package.kernels", lambda found: None, "products") is None
    with pytest.warns(UserWarning, match="^products: wrong"):
        assert working("math", lambda found: "wrong", "products") is None


def test_a_gap_that_is_no_number_is_not_lost_among_others():
    exact = torch.zeros(2)
    assert largest_gap([(torch.tensor([0.0, -2.0]), exact), (torch.ones(2, dtype=torch.bfloat16), exact)]) == 2
    for place in range(3):
        pairs = [(torch.full((2,), torch.nan if i == place else 1.0), exact) for i in range(3)]
        assert math.isnan(largest_gap(pairs))
