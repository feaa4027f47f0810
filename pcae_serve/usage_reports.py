"""Switch off the usage reports that dependencies send unasked.

Importing `pcae_serve` does this, hence before ONNX Runtime and the others are imported: they read
these variables once. A variable that has a value keeps it, so the same variables opt in.
"""

import os

#: Variables that dependencies read, and the values that switch their reports off.
SWITCHES = {
    # from 1.32 on: a device id and a database of events in the user's cache, sent to Microsoft
    "ORT_DISABLE_TELEMETRY": "1",
    # versions of installed packages in the headers of each download, and a daily extra request
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # `datasets` counts the reading of local folders and files, too, on Hugging Face's server
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    # read by `ray.init`, hourly reports; `serve run` and `ray start` need it in their environment
    "RAY_USAGE_STATS_ENABLED": "0",
}


def switch_off() -> None:
    """Set each variable that is unset or empty. Child processes inherit them."""
    for name, value in SWITCHES.items():
        if not os.environ.get(name):
            os.environ[name] = value
