"""Every setting of the server; a flag, a PCAE_* variable and a config key share its name.

Flags override the environment, the environment the config file, the file these defaults.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from pcae_serve.bounded_file import read_regular
from pcae_serve.bundle.preprocess import MAX_PIXELS
from pcae_serve.command import config
from pcae_serve.flags import Metavar, did_you_mean
from pcae_serve.scheduling.policies.registry import NAMES, WITH_TIER
from pcae_serve.scheduling.policies.waiting_price import DEFAULT_PRICE
from pcae_serve.sources.cache_folder import CACHE_DIR as CACHE_DIR
from pcae_serve.sources.names import ModelName

MAX_BATCH = 32  # images per batch

#: The variable that names the config file.
CONFIG_FILE = "PCAE_CONFIG"
#: Size of that file, at most.
MAX_CONFIG_BYTES = 1_000_000
#: PCAE_* variables that are not settings of the server: the client's key, and other programs'.
OTHER_VARIABLES = (CONFIG_FILE, "PCAE_API_KEY")
OTHER_PREFIXES = ("PCAE_SERVE_", "PCAE_TRAIN_", "PCAE_EXPORT_")

_HOST_NAME = re.compile(r"\*|[\w.-]+|[0-9a-f.:]+", re.ASCII)
_ORIGIN = re.compile(
    r"\*|null|[a-z][a-z0-9+.-]*://[\w.-]+(:\d+)?|https?://\[[0-9a-f:.]+\](:\d+)?", re.ASCII
)
_POLICIES = ", ".join(f"{name}:TIER" if name in WITH_TIER else name for name in NAMES)


class Settings(BaseSettings):
    """Serve a bundle over HTTP. Without --bundle, serve the demo bundle inside the package.

    Every option can also be set by a variable (PCAE_BUDGET_MS for --budget-ms) and by a key of the
    TOML file that PCAE_CONFIG names (budget_ms).
    """

    model_config = config("pcae-serve") | {"env_prefix": "PCAE_", "extra": "forbid"}

    #: Sections of --help and of docs/configuration.md.
    flag_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "bundle and device": ("bundle", "device", "backend", "threads", "decode_threads"),
        "network and access": (
            "host",
            "port",
            "max_connections",
            "api_keys_file",
            "admin_keys_file",
            "open_access",
            "docs",
            "playground",
            "callers",
            "root_path",
            "trusted_proxies",
            "allowed_hosts",
            "allowed_origins",
        ),
        "scheduling": (
            "policy",
            "waiting_price",
            "max_looks",
            "budget_ms",
            "max_batch",
            "queue_limit",
        ),
        "request limits": (
            "max_body_mb",
            "max_images",
            "max_pixels",
            "memory_mb",
            "max_uploads",
            "upload_s",
            "min_upload_kb_s",
        ),
        "failure and shutdown": ("watchdog_s", "drain_s"),
        "latency profile and cache": ("cache_dir", "profile_s"),
        "logging": ("log_format", "log_level", "access_log", "event_log"),
    }

    bundle: Annotated[ModelName | None, Metavar("DIR")] = Field(
        None,
        description="folder of the bundle to serve, or its name: hf://OWNER/NAME[@REVISION] on the"
        " Hugging Face hub, https://…, s3://… or gs://…; the demo bundle by default",
    )
    device: Annotated[str, Metavar("auto|cpu|cuda:N")] = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda:\d+(,cuda:\d+)*)$",
        description="device to run on; auto uses the first NVIDIA GPU, or the CPU if there is none;"
        " several equal GPUs share one queue: cuda:0,cuda:1",
    )
    backend: Literal["auto", "tensorrt", "cuda", "onnxruntime", "simulated"] = Field(
        "auto",
        description="inference engine: tensorrt (needs plans: pcae-export tensorrt), cuda (ONNX"
        " Runtime on the GPU), onnxruntime (ONNX Runtime on the CPU); auto uses the first of these"
        " that works and logs why the others do not; simulated returns dummy predictions with"
        " realistic latency",
    )
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads per batch; 0: one for each core that the process may use, by CPU"
        " affinity and quota",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        description="small images decoded in parallel, and as many large ones; 0: one for each"
        " core that the process may use",
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all interfaces")
    port: Annotated[int, Metavar("PORT")] = Field(
        8000, ge=0, le=65535, description="port to listen on; 0 selects a free port"
    )
    max_connections: int = Field(
        0,
        ge=0,
        description="maximum number of open connections; beyond it the longest idle one is closed"
        " for each new one; 0: 4,096, or what the limit of file descriptors allows if that is less",
    )
    api_keys_file: Path | None = Field(
        None, description="file of API keys, one per line; every request must carry one of them"
    )
    admin_keys_file: Path | None = Field(
        None, description="file of keys for /admin; without it the admin routes are disabled"
    )
    open_access: bool = Field(
        False, description="allow unauthenticated access on a non-loopback address"
    )
    docs: Literal["open", "keys", "off"] = Field(
        "open",
        description="access to /docs and /openapi.json: open: without a key; keys: with an API key,"
        " if the server requires keys; off: the pages do not exist",
    )

    playground: bool = Field(
        True, description="serve the page / on which people try the server; its requests need a key"
    )

    callers: Literal["auto", "key", "address", "off"] = Field(
        "auto",
        description="what distinguishes the callers that share a busy server: key: their API key;"
        " address: their IPv4 address or IPv6 network of 64 bits; auto: key if --api-keys-file is"
        " set, else address; off: nothing, for a proxy that hides addresses",
    )

    root_path: Annotated[str | None, Metavar("PATH")] = Field(
        None,
        pattern=r"^(/[A-Za-z0-9._~-]+)*/?$",
        description="prefix under which a proxy serves this server, such as /vision; /docs and"
        " /openapi.json refer to it",
    )
    trusted_proxies: Annotated[str, Metavar("ADDRESSES")] = Field(
        "127.0.0.1,::1",
        description="comma-separated addresses and networks of proxies; X-Forwarded-For,"
        " X-Forwarded-Proto and X-Forwarded-Prefix are used if one of them sends them; * for all",
    )

    allowed_hosts: Annotated[str, Metavar("NAMES")] = Field(
        "",
        description="comma-separated names that the header Host may have, in addition to localhost"
        " and --host; * for all; by default, other names are refused only on loopback without API"
        " keys",
    )
    allowed_origins: Annotated[str, Metavar("ORIGINS")] = Field(
        "",
        description="comma-separated origins of web pages that may use the server from a browser"
        " (CORS), such as https://app.example; * for all",
    )

    policy: Annotated[str, Metavar("NAME")] = Field(
        "pace",
        description=f"how tier and batch are chosen: {_POLICIES}; NAME+drop also drops requests"
        " that cannot be answered in time as part of a full batch",
    )
    waiting_price: float = Field(
        DEFAULT_PRICE,
        ge=0,
        allow_inf_nan=False,
        description="accuracy, in percentage points, that must be gained for each 100 ms of"
        " response time that it costs; considered by policy pace; 0: use the whole budget",
    )
    max_looks: int = Field(
        2,
        ge=1,
        le=2,
        description="how often an image may run: 2 lets the server run an image whose answer is"
        " unsure again on a better tier, if time is left and the bundle is calibrated",
    )
    budget_ms: float = Field(
        1000,
        gt=0,
        allow_inf_nan=False,
        description="latency budget of requests that do not set budget_ms",
    )
    max_batch: int = Field(MAX_BATCH, ge=1, description="maximum number of images per batch")
    queue_limit: int = Field(
        256,
        ge=1,
        description="maximum number of waiting requests; further ones get 503 with Retry-After",
    )

    max_body_mb: float = Field(
        20, gt=0, description="maximum size of a request body; larger ones get 413"
    )
    max_images: int = Field(
        64, ge=1, description="maximum number of images per request; a larger request gets 413"
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="maximum number of pixels per image; a larger one gets 413"
    )
    memory_mb: float = Field(
        0,
        ge=0,
        description="memory that all requests may take together (bodies, decoding, pixels); what"
        " does not fit gets 503; 0: 80 % of the control group's limit, or half of the machine's"
        " memory if there is none, less what the server uses at rest",
    )
    max_uploads: int = Field(
        0,
        ge=0,
        description="maximum number of uploads in progress; beyond it, the one that is furthest"
        " behind is dropped (503); 0: half the connections, at most 1,024",
    )
    upload_s: float = Field(
        30, gt=0, description="maximum time to receive a request body; then 408"
    )
    min_upload_kb_s: Annotated[float, Metavar("KB_S")] = Field(
        10,
        gt=0,
        description="minimum rate of a request body in kB/s; one that is 5 s behind it gets 408",
    )

    watchdog_s: float = Field(
        10,
        gt=0,
        le=600,
        description="batch timeout; a batch that exceeds it is failed and its engine is terminated",
    )
    drain_s: float = Field(
        20,
        ge=0,
        le=3600,
        description="after SIGTERM, maximum time to answer accepted requests before the exit",
    )

    cache_dir: Path = Field(
        CACHE_DIR,
        description="cache of this machine's latency profiles, TensorRT plans and fetched bundles",
    )
    profile_s: float = Field(
        6.0, gt=0, le=10, description="time to measure latencies at start if none are cached"
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="format of log records, which go to standard error"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level to log"
    )
    access_log: bool = Field(True, description="log one record per request")
    event_log: Annotated[Path | None, Metavar("FILE")] = Field(
        None,
        description="record the scheduler's events and actions in this file, for replay; it is"
        " overwritten at each start and grows without bound, by about 0.5 kB per request",
    )

    @property
    def devices(self) -> tuple[str, ...]:
        """Return each device by itself; one element for auto and cpu."""
        return tuple(self.device.split(","))

    @property
    def allowed_host_list(self) -> list[str]:
        return _split(self.allowed_hosts)

    @property
    def allowed_origin_list(self) -> list[str]:
        return _split(self.allowed_origins)

    @field_validator("device")
    @classmethod
    def _each_device_once(cls, device: str) -> str:
        numbers = [int(name.removeprefix("cuda:")) for name in device.split(",") if ":" in name]
        twice = [number for number in numbers if numbers.count(number) > 1]
        if twice:
            raise ValueError(f"cuda:{twice[0]} is named twice")
        return device

    @field_validator("root_path")
    @classmethod
    def _without_trailing_slash(cls, root_path: str | None) -> str | None:
        return root_path and root_path.rstrip("/")

    @field_validator("trusted_proxies")
    @classmethod
    def _addresses(cls, trusted_proxies: str) -> str:
        if trusted_proxies != "*":
            for address in trusted_proxies.split(","):
                ip_network(address.strip(), strict=False)  # raises a ValueError that names it
        return trusted_proxies

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, allowed_hosts: str) -> str:
        for name in _split(allowed_hosts):
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a host name; leave out scheme, port and path")
        return allowed_hosts

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, allowed_origins: str) -> str:
        for origin in _split(allowed_origins):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example:8443")
        return allowed_origins

    @model_validator(mode="after")
    def _access_controlled(self) -> Self:
        if self.api_keys_file is None and not self.open_access and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} accepts requests from other machines; set --api-keys-file, or"
                " --open-access to allow requests without a key"
            )
        return self

    @model_validator(mode="after")
    def _callers_known(self) -> Self:
        if self.callers == "key" and self.api_keys_file is None:
            raise ValueError("--callers key needs --api-keys-file")
        return self

    @classmethod
    def config_key(cls, name: str) -> str | None:
        """Return where the config file sets a field, as "FILE: KEY", or None if it does not."""
        path = os.environ.get(CONFIG_FILE)
        if path is None or name not in _read_config(path):
            return None
        return f"{path}: {name}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, then the file that PCAE_CONFIG names."""
        path = os.environ.get(CONFIG_FILE)
        if path is None:
            return init_settings, env_settings
        try:
            content = _read_config(path)
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise SettingsError(f"{CONFIG_FILE}: {path} cannot be read: {why}") from None
        known = settings_cls.model_fields
        for key in content:
            if key not in known:
                raise SettingsError(f"{path}: unknown key {key!r}{did_you_mean(key, known)}")
        return init_settings, env_settings, InitSettingsSource(settings_cls, content)


def _read_config(path: str) -> dict[str, Any]:
    """Return the content of a config file. Raise OSError, ValueError or RecursionError."""
    return tomllib.loads(read_regular(Path(path).expanduser(), MAX_CONFIG_BYTES).decode())


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a warning for each PCAE_* variable that is not a setting, with the nearest name."""
    known = [*OTHER_VARIABLES, *(f"PCAE_{name}".upper() for name in Settings.model_fields)]
    return [
        f"{name} is set, but it is not a setting{did_you_mean(name.upper(), known, 'PCAE_')}"
        for name in environment
        if name.upper().startswith("PCAE_")
        and name.upper() not in known
        and not name.upper().startswith(OTHER_PREFIXES)
    ]


def is_loopback(host: str) -> bool:
    """Return whether a name or address always is of this machine itself."""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _split(words: str) -> list[str]:
    """Return comma-separated words in lower case."""
    return [word.strip().lower() for word in words.split(",") if word.strip()]
