"""Features in the form that a caller asks for: of length 1 or as computed, float32 or float16."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pcae_serve.errors import InvalidParameter, shown

DType = Literal["float32", "float16"]


def convert(values: NDArray[np.float32], normalize: bool, dtype: str) -> NDArray[Any]:
    """Return vectors float32 [..., D] in the form that was asked for.

    normalize: divide each vector by its Euclidean length; a vector of zeros stays. dtype: float32
    or float16. Raises InvalidParameter for another dtype, or for a value that float16 cannot hold.
    """
    if dtype not in ("float32", "float16"):
        raise InvalidParameter(f"dtype {shown(dtype)} is unknown; choose float32 or float16")
    if normalize:
        length = np.linalg.norm(values, axis=-1, keepdims=True)
        values = values / np.maximum(length, np.finfo(np.float32).tiny)
    if dtype == "float32":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise InvalidParameter(
            f"a feature is {np.abs(values).max():.3g}, and float16 ends at 65,504; ask for dtype"
            " float32 or normalize"
        )
    return half
