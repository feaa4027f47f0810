"""Compare pcae-serve with other servers: install, export, measure, report.

    python -m benchmarks.compare --data FASHION_MNIST [--out OUT] [--rounds 5] [--minutes M]

Two cores: each server has the first one, the load generator the second one. One call does all of
it: the peers' environments with pinned versions, the models, every row in every round, the tables.
With --minutes the call ends in time with exit status 75, and the same command goes on from
OUT/raw.jsonl. --rows, --servers and --models restrict it.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.compare import environments, models, report
from benchmarks.compare.log import Log, OutOfTimeError
from benchmarks.compare.rows import ROWS, Bench, Job
from benchmarks.compare.servers import SERVERS, prefer

CONTINUE = 75


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's parquet files")
    parser.add_argument("--out", type=Path, default=environments.ROOT / "runs" / "compare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e6, help="of measuring in this call")
    parser.add_argument("--nice", type=int, default=0, help="priority of servers and generator")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--models", default="demo,vit-ti")
    options = parser.parse_args()
    servers, wanted = options.servers.split(","), options.models.split(",")
    for name in {SERVERS[server].environment for server in servers}:
        environments.install(name)
    for model in wanted:
        models.prepare(model, options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "raw.jsonl", time.monotonic() + 60 * options.minutes)
    bench = Bench(log, options.out / "logs", options.nice)
    prefer(options.nice)
    try:
        for row in options.rows.split(","):
            for round_ in range(options.rounds):
                for setting in ROWS[row].servers:
                    if setting.model in wanted:
                        jobs = ROWS[row].jobs(row, setting, round_)
                        run(bench, [job for job in jobs if job.server in servers])
    except OutOfTimeError:
        return CONTINUE
    finally:
        bench.dismiss()
        (options.out / "tables.md").write_text(report.tables(log))
    return 0


def run(bench: Bench, jobs: list[Job]) -> None:
    """Measure a round of one row and model unless the log has it."""
    if any(bench.log.get(job.key) is None for job in jobs):
        bench.bare(jobs[0].setting)
        bench.log.require(40)
        ROWS[jobs[0].row].measure(bench, jobs)
        bench.dismiss()


if __name__ == "__main__":
    sys.exit(main())
