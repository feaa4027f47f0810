#!/usr/bin/env bash
# Compare a live server with the simulator on the same traces, then overload the server for a minute.
#
#     benchmarks/live.sh [FOLDER]     two cores: the server on one, the load generator on the other; 6 min
#
# The simulator uses the profile that the server measured, and the CPU time per request of HTTP and
# decoding: that of all threads of the server except the busiest one, the engine's.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/live}; mkdir -p "$out"
bin=.venv-test/bin port=8077 url=http://127.0.0.1:8077
export PCAE_CACHE_DIR="$out/cache"
taskset -c 0 $bin/pcae-serve --port $port --threads 1 --event-log "$out/events.jsonl" >"$out/server.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
until $bin/python -c "import urllib.request as u; u.urlopen('$url/readyz')" 2>/dev/null; do sleep 0.5; done
spent_ms() { # CPU time of all threads except the busiest
    cat /proc/$server/task/*/schedstat | awk '{ all += $1; if ($1 > most) most = $1 } END { print (all - most) / 1e6 }'
}
rss() { grep VmRSS /proc/$server/status; }
for trace in poisson azure-code; do
    before=$(spent_ms)
    $bin/pcae-serve replay $url --pin 1 --trace $trace --mix mixed --rate 20,40,60,80 --requests 1200 \
        --json "$out/live_$trace.json" >"$out/live_$trace.txt" || echo "invalid or failed: $trace"
    host_ms=$(awk "BEGIN { print ($(spent_ms) - $before) / 4800 }")
    echo "HTTP and decoding: $host_ms ms per request"
    PCAE_THREADS=1 taskset -c 1 $bin/pcae-serve simulate --profile machine --policy pace --trace $trace \
        --mix mixed --rate 20,40,60,80 --requests 1200 --seeds 1 --decode-ms 4 --host-ms $host_ms --jobs 1 --capacity 100 \
        --json "$out/simulated_$trace.json" >"$out/simulated_$trace.txt" || echo "simulation failed: $trace"
done
rss
for rate in 60 90 120 200 40; do # budgets from 8x; the last rate shows the recovery
    $bin/pcae-serve replay $url --pin 1 --trace poisson --mix 8:0.7,50:0.3 --rate $rate \
        --requests $((rate * (rate == 200 ? 60 : 10))) --json "$out/overload_$rate.json" \
        --rows "$out/overload_$rate.csv" >"$out/overload_$rate.txt" || echo "invalid or failed: $rate"
    rss
done
