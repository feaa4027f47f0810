"""The attacks by name."""

from benchmarks.attacks import callers, chunks, connections, decodes, uploads
from benchmarks.attacks.base import Attack

_KINDS: tuple[type[Attack], ...] = (
    decodes.ExifSegments,
    decodes.LargeExifSegments,
    decodes.ExifRationals,
    decodes.TiffRationals,
    decodes.PngProfiles,
    decodes.LosslessWebp,
    decodes.ProgressiveScans,
    decodes.LargePhotos,
    uploads.IdleUploads,
    uploads.SlowUploads,
    uploads.UploadBursts,
    chunks.OneByteChunks,
    callers.PinnedToFull,
    callers.TwoPinnedToFull,
    callers.GreedyBatches,
    callers.GreedySingles,
    connections.Descriptors,
)
ATTACKS: dict[str, type[Attack]] = {kind.name: kind for kind in _KINDS}
