"""Turn logits into probabilities: of one class among all, or of each label by itself."""

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.manifest import Answers


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities [..., classes] that sum to 1."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: NDArray[np.float32] = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the probability [..., labels] of each label by itself."""
    shares: NDArray[np.float32] = 0.5 * (1 + np.tanh(0.5 * logits))  # no overflow
    return shares


def margin(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Return the probability of the first class minus the second's, [...], for [..., classes]."""
    two = np.partition(softmax(logits / temperature), -2, axis=-1)[..., -2:]
    difference: NDArray[np.float32] = two[..., 1] - two[..., 0]
    return difference


def same_answer(
    one: NDArray[np.float32], other: NDArray[np.float32], answers: Answers
) -> NDArray[np.bool_]:
    """Return for which rows of logits [N, width] the answer is the same: bool [N].

    Classes: the same best class. Labels: the same set with a probability of 0.5 or more.
    """
    if answers == "labels":
        alike: NDArray[np.bool_] = ((one >= 0) == (other >= 0)).all(axis=1)
        return alike
    same: NDArray[np.bool_] = one.argmax(axis=1) == other.argmax(axis=1)
    return same
