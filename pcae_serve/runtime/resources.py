"""What all servables of a service share: decoders, uploads and memory."""

from dataclasses import dataclass

from pcae_serve.runtime.decoders import Decoders
from pcae_serve.runtime.memory_budget import MemoryBudget
from pcae_serve.runtime.uploads import Uploads


@dataclass(frozen=True)
class Resources:
    """What the requests of all servables compete for before they are queued."""

    memory: MemoryBudget
    decoders: Decoders
    uploads: Uploads
