"""An inference request and its result, as the API and the runtime exchange them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle


@dataclass(frozen=True)
class InferenceRequest:
    """An inference request for one image."""

    arrival_s: float  # event loop time at which its headers were parsed
    budget_ms: float
    tier: str = "auto"
    min_tier: str | None = None
    answers: Literal["logits", "features"] | None = None  # None: what the bundle returns
    caller: str = ""  # whom its share of a busy server belongs to; empty: unknown
    key_name: str | None = None  # of its API key, for rate limit, metrics and logs
    max_looks: int | None = None  # how often it may run; None: the server's setting

    patches: bool = False  # the patch grid is wanted as well
    number_bytes: int = 4  # what each of its numbers takes until it is sent, all forms together
    smaller: str = "omit patches"  # how a client asks for an answer of fewer bytes

    @property
    def deadline_s(self) -> float:
        return self.arrival_s + self.budget_ms / 1e3


@dataclass(frozen=True)
class InferenceResult:
    """The result for one image of a batch, and where its time went."""

    vector: NDArray[np.float32]  # [classes] logits, or [width] features
    kept: tuple[NDArray[np.int32], ...]  # per stage [m_i]
    met_budget: bool
    bundle: Bundle  # that produced it
    tier: Tier
    reason: str  # why this tier
    looks: int  # how often the image ran: once, or again on a better tier
    decode_s: float
    queue_s: float
    compute_s: float
    total_s: float
    patches: NDArray[np.float32] | None = None  # [H, W, D], if requested
    first_tier: Tier | None = None  # of the first look, if this is the answer of the second
