"""Every setting of the server, once: flag, PCAE_* variable and config key name the same field.

Flags win over the environment, the environment over the file, the file over these defaults.
"""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from platformdirs import user_cache_path
from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsError,
    TomlConfigSettingsSource,
)

from pcae_serve.bundle.preprocess import MAX_PIXELS
from pcae_serve.command import config
from pcae_serve.scheduling.policies.registry import NAMES, WITH_TIER

#: Where what belongs to this machine is kept: latency profiles, TensorRT plans.
CACHE_DIR = user_cache_path("pcae-serve")
MAX_BATCH = 32  # images in one batch at most

_POLICIES = (
    ", ".join(f"{name}:TIER" if name in WITH_TIER else name for name in NAMES)
    + "; each also with +drop, which gives up those who cannot make it in a full batch"
)


class Settings(BaseSettings):
    """Serve a bundle over HTTP; without --bundle, the demo bundle inside the package."""

    model_config = config("pcae-serve") | {"env_prefix": "PCAE_", "extra": "forbid"}

    bundle: Path | None = Field(None, description="bundle folder; the demo bundle where left out")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    api_keys_file: Path | None = Field(
        None, description="file of API keys, one a line, one of which every request must bring"
    )
    admin_keys_file: Path | None = Field(
        None, description="file of keys for /admin; without it nobody may use those routes"
    )
    open_access: bool = Field(
        False, description="answer without API keys where others than this machine can reach us"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda:\d+(,cuda:\d+)*)$",
        description="cpu, cuda:N, several equal GPUs with one queue as cuda:0,cuda:1, or auto: the"
        " first NVIDIA GPU where there is one, else the CPU",
    )
    backend: Literal["auto", "tensorrt", "cuda", "onnxruntime", "simulated"] = Field(
        "auto",
        description="tensorrt (needs plans: pcae-export tensorrt), cuda (ONNX Runtime on the GPU),"
        " onnxruntime (on the CPU), or auto: the first of these that works, each step down logged;"
        " simulated answers nonsense in realistic time",
    )
    threads: int = Field(
        0,
        ge=0,
        description="threads of one batch on a CPU; 0 = one for each core that we may use, by"
        " affinity and quota",
    )
    policy: str = Field("pace", description=f"how tier and batch are chosen: {_POLICIES}")

    budget_ms: float = Field(
        1000, gt=0, allow_inf_nan=False, description="for requests that name no budget_ms"
    )
    max_batch: int = Field(MAX_BATCH, ge=1, description="images in one batch at most")
    queue_limit: int = Field(
        256, ge=1, description="requests that wait at once; beyond, 503 with Retry-After"
    )
    watchdog_s: float = Field(
        10, gt=0, le=600, description="a batch that takes longer has failed, and its engine hangs"
    )
    drain_s: float = Field(
        20, ge=0, le=3600, description="after SIGTERM, for requests in hand; then the server ends"
    )
    upload_s: float = Field(30, gt=0, description="time that a request's body may take; then 408")
    decode_threads: int = Field(
        0, ge=0, description="images decoded at the same time; 0 = as many as cores that we may use"
    )
    max_body_mb: float = Field(20, gt=0, description="bytes of a request body; beyond, 413")
    max_images: int = Field(64, ge=1, description="images in one request; beyond, 413")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="pixels of an image; beyond, 413")

    profile_s: float = Field(
        6.0, gt=0, le=10, description="time to measure latencies where none are cached"
    )
    cache_dir: Path = Field(
        CACHE_DIR, description="what belongs to this machine: latency profiles, TensorRT plans"
    )
    log_format: Literal["text", "json"] = Field("text", description="of the log, on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least serious records that are logged"
    )
    access_log: bool = Field(True, description="log a line at the end of each request")
    event_log: Path | None = Field(
        None,
        description="file for all that the scheduler sees and does, to be replayed; begun anew at"
        " each start, it then grows without bound, by about 0.5 kB a request",
    )

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices by themselves; one where it is auto or the CPU."""
        return tuple(self.device.split(","))

    @field_validator("device")
    @classmethod
    def _each_device_once(cls, device: str) -> str:
        numbers = [int(name.removeprefix("cuda:")) for name in device.split(",") if ":" in name]
        twice = [number for number in numbers if numbers.count(number) > 1]
        if twice:
            raise ValueError(f"cuda:{twice[0]} is named twice")
        return device

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.api_keys_file is None and not self.open_access and not _loopback(self.host):
            raise ValueError(
                f"--host {self.host} lets others than this machine ask: give --api-keys-file, or"
                " --open-access to answer everybody"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and arguments, then the environment, then the file named by PCAE_CONFIG."""
        path = os.environ.get("PCAE_CONFIG")
        if path is None:
            return init_settings, env_settings
        try:
            config = TomlConfigSettingsSource(settings_cls, path)
            Path(path).stat()  # a missing file is skipped in silence otherwise
        except (OSError, ValueError) as error:
            raise SettingsError(f"PCAE_CONFIG: {path} cannot be read: {error}") from None
        return init_settings, env_settings, config


def _loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name that is not known to be so is not."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
