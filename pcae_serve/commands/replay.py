"""pcae-serve replay: flags of a replay; `loadtest.replay` sends the requests."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from pcae_serve.errors import PcaeError
from pcae_serve.loadtest import replay, report
from pcae_serve.loadtest.payloads import Payloads
from pcae_serve.loadtest.replay import LiveServer
from pcae_serve.loadtest.simulation import find_capacity
from pcae_serve.loadtest.workload import Count, WorkloadFlags
from pcae_serve.settings import MAX_BATCH


class Replay(WorkloadFlags):
    """Send a request trace to a running server and report how every request ended.

    Requests are sent at their scheduled times, regardless of earlier responses (open loop). Exit
    code is 1
    if the load generator lagged its schedule too far for the results to be valid.
    """

    url: CliPositionalArg[str] = Field(description="the server, such as http://127.0.0.1:8000")
    rate: list[float] | None = Field(
        None, description="arrival rates in requests per second, such as 20,40"
    )
    load: list[float] | None = Field(
        None, description="arrival rates in multiples of --capacity, instead of --rate"
    )
    capacity: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="requests per second that load 1 stands for;"
        " default: computed from the latencies that the server reports",
    )  # fmt: skip
    requests: Count = Field(2000, description="requests per run; none is discarded as warm-up")
    seeds: Count = Field(1, description="runs per trace and rate, with seeds from 0")
    images: Path | None = Field(
        None,
        description="images to send: a file, a folder, or a parquet file with the columns `image`"
        " and `label` (needs pyarrow); default: a sample image",
    )
    labels: str | None = Field(
        None,
        description="count correct answers by labels in a .csv file with the columns file,label,"
        " in `folders` (the names of the images' folders) or in `column` (of the parquet file)",
    )
    pin: int | None = Field(
        None,
        ge=0,
        description="CPU that sends the requests; keep the server off it, for example with"
        " taskset -c 0 pcae-serve --threads 1",
    )
    ready_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="maximum time to wait for the server to listen and to be ready",
    )
    rows: Path | None = Field(None, description="write every request to this CSV file")
    json_: Path | None = Field(None, alias="json", description="write all figures to this file")
    png: Path | None = Field(
        None, description="plot attainment against accuracy recovered to this file"
    )

    @model_validator(mode="after")
    def _has_rate(self) -> Self:
        recorded = all(trace.endswith(".csv") for trace in self.trace)
        if not (self.load or self.rate or recorded):
            raise ValueError("set --rate or --load; only .csv traces have a rate of their own")
        return self

    def cli_cmd(self) -> None:
        report.require("pcae-serve replay")
        traces = self.traces()
        server = LiveServer.connect(self.url, self.ready_s)
        payloads = Payloads.load(self.images, self.labels, server.labels)
        capacity_per_s = self._capacity(server)
        with replay.pinned(self.pin):
            replay.check_server(server, payloads)
            runs = [
                [
                    replay.run(server, payloads, trace, self.mix, rate, self.requests, seed)
                    for seed in range(self.seeds)
                ]
                for trace in traces
                for rate in self.rates(trace, capacity_per_s)
            ]
        rows = [replay.make_row(server, seeds, self.mix, capacity_per_s) for seeds in runs]
        void = any(row.client["void"] for row in rows)
        labelled = payloads.labels is not None
        notes = [
            f"Server: {server.description}.",
            *(line for row in rows for line in replay.client_lines(row)),
        ]
        report.show(rows, notes, labels=labelled)
        if self.rows is not None:
            replay.write_requests(
                self.rows, [run for seeds in runs for run in seeds], server.tier_table
            )
        if self.json_ is not None:
            about = {
                "command": "replay",
                "settings": self.model_dump(mode="json"),
                "capacity_per_s": capacity_per_s,
                "server": server.info,
                "void": void,
            }
            report.write_json(self.json_, rows, about, labels=labelled)
        if self.png is not None:
            report.write_png(self.png, rows, server.description)
        if void:
            raise PcaeError(
                f"invalid run: the load generator lagged its schedule by more than"
                f" {1e3 * replay.MAX_LAG_S:g} ms at p99, so the results measure the generator, not"
                " the server; pin it to a free core (--pin) or lower the load"
            )

    def _capacity(self, server: LiveServer) -> float | None:
        if self.capacity is not None or not self.load:
            return self.capacity
        return find_capacity(server.platform, self.mix, MAX_BATCH)
