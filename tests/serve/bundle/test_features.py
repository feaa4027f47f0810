"""Features in the form that a caller asks for."""

import numpy as np
import pytest

from pcae_serve.bundle.features import convert
from pcae_serve.errors import InvalidParameter

VALUES = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)


def test_each_vector_is_divided_by_its_length_and_zeros_stay() -> None:
    assert convert(VALUES, normalize=False, dtype="float32") is VALUES
    np.testing.assert_allclose(
        convert(VALUES, True, "float32"), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6
    )
    assert convert(VALUES, True, "float32").dtype == np.float32


def test_float16_refuses_what_it_cannot_hold() -> None:
    assert convert(VALUES, False, "float16").dtype == np.float16
    large = VALUES * 1e5
    with pytest.raises(InvalidParameter, match=r"a feature is 4e\+05, and float16 ends at 65,504"):
        convert(large, False, "float16")
    assert np.isfinite(convert(large, True, "float16")).all()


def test_another_dtype_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="dtype 'int8' is unknown; choose float32 or"):
        convert(VALUES, False, "int8")
