"""A kernel is used only where it has been seen to work."""

from __future__ import annotations

import pytest

from nemo_brain.core.first_use import works_here


def test_a_kernel_that_fails_or_computes_something_else_is_not_used_and_a_warning_says_why(recwarn):
    def failing() -> str | None:
        raise RuntimeError("out of resources")

    assert works_here(lambda: None, "products") and not recwarn.list
    with pytest.warns(UserWarning, match=r"^products: it does not run here: RuntimeError\('out of resources'\)"):
        assert not works_here(failing, "products")
    with pytest.warns(UserWarning, match="^products: it is 0.3 away"):
        assert not works_here(lambda: "it is 0.3 away", "products")
