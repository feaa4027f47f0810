"""Load the bundle that replaces the one in service, while that one answers requests."""

import asyncio
from functools import partial
from typing import NamedTuple

from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.engines.base import Engine, run_directly
from pcae_serve.errors import PcaeError, ReloadFailed, one_line
from pcae_serve.runtime import latency_profile
from pcae_serve.runtime.background_engine import BackgroundEngine
from pcae_serve.runtime.bundle_folder import find_bundle
from pcae_serve.runtime.servable import EngineFactory, Servable
from pcae_serve.runtime.tiers import tier_table
from pcae_serve.scheduling.policies.registry import create
from pcae_serve.sources.names import is_remote

#: Seconds of compute to measure the new bundle with.
PROFILE_S = 2.0


class Replacement(NamedTuple):
    """A bundle that is loaded, tried and measured."""

    bundle: Bundle
    engines: list[Engine]  # one per device
    profile: latency_profile.Profile


def load_replacement(
    old: Servable, make_engine: EngineFactory | None, loop: asyncio.AbstractEventLoop
) -> Replacement:
    """Load what the folder of the old bundle, or its name on a hub, holds now.

    Blocks; call it on a thread of its own.
    Every batch runs as a background task of `old`, or directly if nothing of it works any more:
    then there are no requests to give way to. Raises PcaeError.
    """
    if make_engine is None:
        raise ReloadFailed("this server cannot create engines")
    settings, engines = old.settings, list[Engine]()
    in_background = partial(BackgroundEngine, servable=old, loop=loop)
    try:
        fetched = find_bundle(settings) if is_remote(settings.bundle or "") else None
        bundle = load_bundle(fetched or old.bundle.root)
        create(settings.policy, tier_table(bundle.tiers))  # raises if the policy is unknown
        for device in range(len(old.engines)):
            wrap = in_background if old.works else run_directly
            engines.append(make_engine(bundle, device, wrap))
        limit_s = min(settings.profile_s, PROFILE_S)
        if old.works:
            background = in_background(engines[0])
            profile = latency_profile.load(
                bundle, background, settings.cache_dir, limit_s, clock=background.clock
            )
        else:
            profile = latency_profile.load(bundle, engines[0], settings.cache_dir, limit_s)
    except BaseException as error:
        for engine in engines:
            engine.close()
        if isinstance(error, PcaeError):
            raise
        raise ReloadFailed(f"the new bundle does not run: {one_line(error)}") from error
    return Replacement(bundle, engines, profile)
