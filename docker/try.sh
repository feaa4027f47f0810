#!/usr/bin/env bash
# Build an image without a Docker engine, and test what docs/containers.md states about it.
#
# As root on Debian or Ubuntu: debootstrap makes a base, buildah builds on it, and the server is
# started in three ways: by buildah, and as PID 1 on a read-only root file system, both as the
# image's own user and as a user id without an account. Exit code 0: passed. 3: not tested; the last
# line has the reason.
#
#   docker/try.sh [--keep FOLDER] [--target cpu|gpu]
set -euo pipefail
cd "$(dirname "$0")/.."

target=cpu keep=
while (($#)); do
    case $1 in
        --keep) keep=$(realpath -m "$2") && shift 2 ;;
        --target) target=$2 && shift 2 ;;
        *) echo "docker/try.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
done

cannot() {
    echo "image NOT tested: $1" >&2
    exit 3
}

fail() {
    echo "image: $1" >&2
    [[ ! -s $work/server.log ]] || tail -n 20 "$work/server.log" >&2
    exit 1
}

[[ $(id -u) == 0 ]] || cannot "buildah and debootstrap need root here"
for tool in buildah debootstrap curl jq unshare; do
    command -v "$tool" >/dev/null || cannot "$tool is missing: apt-get install $tool"
done

work=${keep:-$(mktemp -d /tmp/pcae-image.XXXXXX)}
mkdir -p "$work"
store=(--root "$work/store" --runroot "$work/run" --storage-driver vfs)
image=localhost/pcae-serve:$target
no_gpu=WARNING # log level of the message that no GPU was found
[[ $target != cpu ]] || no_gpu=INFO
started= # process id of the running server

clean() {
    [[ -z $started ]] || kill -KILL "$started" 2>/dev/null || true
    buildah "${store[@]}" umount --all >/dev/null 2>&1 || true
    buildah "${store[@]}" rm --all >/dev/null 2>&1 || true
    rm -f "$work/server.log" "$work/pip.conf"
    [[ -n $keep ]] || rm -rf "$work"
}
trap clean EXIT

quietly() { # show the output of a tool only if it fails
    "$@" >"$work/tool.log" 2>&1 || { tail -n 40 "$work/tool.log" >&2 && fail "failed: $*"; }
}

# --- build

if ! buildah "${store[@]}" inspect --type image localhost/base >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm \
        "$work/base" >"$work/tool.log" 2>&1 ||
        { tail -n 5 "$work/tool.log" >&2 && cannot "debootstrap cannot make a base"; }
    rm -rf "$work"/base/var/{cache/apt,lib/apt/lists,log}/* "$work"/base/usr/share/{doc,man}/*
    base=$(buildah "${store[@]}" from scratch)
    quietly buildah "${store[@]}" add --quiet "$base" "$work/base" /
    quietly buildah "${store[@]}" commit --quiet --rm "$base" localhost/base
    rm -rf "$work/base"
fi

# this machine's pip settings, without paths on its disk, and the certificates that it trusts
{
    echo "[global]"
    echo "cert = /run/secrets/ca.pem"
    for setting in index-url extra-index-url trusted-host proxy; do
        value=$(python3 -m pip config get "global.$setting" 2>/dev/null | tr ' ' '\n' | grep -v '^file:' | paste -sd ' ') || true
        [[ -z $value ]] || echo "$setting = $value"
    done
} >"$work/pip.conf"
certificates=${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}

build_s=$SECONDS
quietly buildah "${store[@]}" bud --isolation chroot --format docker \
    --ignorefile docker/Dockerfile.dockerignore --build-arg BASE_IMAGE=localhost/base \
    --secret id=pip.conf,src="$work/pip.conf" --secret id=ca.pem,src="$certificates" \
    --target "$target" --tag "$image" --file docker/Dockerfile .
build_s=$((SECONDS - build_s))

# --- contents

container=$(buildah "${store[@]}" from --pull-never "$image")
root=$(buildah "${store[@]}" mount "$container")
config=$(buildah "${store[@]}" inspect --type image "$image" | jq .Docker.config)
mapfile -t entry < <(jq -r '.Entrypoint[]' <<<"$config")
mapfile -t variables < <(jq -r '.Env[]' <<<"$config")
user=$(jq -r .User <<<"$config")
megabytes() { du --apparent-size -sxm "$1" | cut -f 1; }

[[ $user =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "its user is '$user', not a number other than 0"
[[ ${entry[0]} == /opt/venv/bin/python ]] || fail "its entry point is not the server itself: ${entry[*]}"
jq -e '.Healthcheck.Test[0] == "CMD"' <<<"$config" >/dev/null || fail "it has no HEALTHCHECK"
jq -e '.Labels["org.opencontainers.image.version"]' <<<"$config" >/dev/null || fail "it lacks labels"
for name in '*/bin/gcc' '*/bin/cc' '*/torch' '*/onnx' '/opt/pip' '/opt/venv/bin/pip*' '/root/.cache' \
    '/src' '/etc/pip.conf' '/run/secrets/*'; do
    found=$(find "$root" -xdev -path "$root$name" -print -quit)
    [[ -z $found ]] || fail "it contains ${found#"$root"}"
done
label=$(jq -r '.Labels["org.opencontainers.image.version"]' <<<"$config")
version=$(chroot --userspec="$user" "$root" /usr/bin/env -i "${variables[@]}" pcae-serve --version) ||
    fail "the command pcae-serve does not run"
[[ $version == "pcae-serve $label" ]] || fail "its label has version $label, but it is $version"
total=$(megabytes "$root")
[[ $target != cpu || $total -lt 400 ]] || fail "its size is $total MB; the limit is 400 MB"
echo "image: $image built in $build_s s: $total MB, of which /opt/venv $(megabytes "$root/opt/venv"), /opt/pcae-serve" \
    "$(megabytes "$root/opt/pcae-serve"), /bundle $(megabytes "$root/bundle")"

# --- behaviour

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# contain UID:GID VARIABLE=VALUE … -- ARG …: run the image's entry point as PID 1 of a process
# namespace, on the image's root, read-only, with /cache and /tmp in memory. Each step is an exec, so
# a signal to this process's only child reaches PID 1, as from a container engine.
contain() {
    local uid=$1 given=()
    shift
    while [[ $1 != -- ]]; do given+=("$1") && shift; done
    shift
    # shellcheck disable=SC2016  # expanded by the inner shell
    exec unshare --pid --mount --fork --kill-child bash -euc '
        root=$1 uid=$2; shift 2
        mount --bind "$root" "$root"; mount -o remount,bind,ro "$root"
        mount -t tmpfs tmpfs "$root/tmp"; mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
        mount -t tmpfs -o mode=0775,uid=10001,gid=0 tmpfs "$root/cache"
        exec chroot --userspec="$uid" --groups= "$root" "$@"' \
        - "$root" "$uid" /usr/bin/env -i "${variables[@]}" "${given[@]}" "${entry[@]}" "$@"
}

# running NAME UID:GID START…: check that START answers, reports the missing GPU at the right level,
# has the right user, writes its cache, passes the image's health check, and exits with 0 on SIGTERM.
running() {
    local name=$1 expected=$2 server begun waited level status=0 port
    shift 2
    port=$(free_port)
    begun=$(date +%s%N)
    "$@" "PCAE_PORT=$port" >"$work/server.log" 2>&1 &
    started=$!
    until curl -fs "localhost:$port/readyz" >/dev/null; do
        kill -0 "$started" 2>/dev/null || fail "$name: exited before it was ready"
        waited=$((($(date +%s%N) - begun) / 1000000))
        ((waited < 60000)) || fail "$name: not ready after 60 s"
        sleep 0.05
    done
    waited=$((($(date +%s%N) - begun) / 1000000))

    level=$(grep -oP '[A-Z]+(?= \S+ using the CPU: no NVIDIA driver found)' "$work/server.log") || true
    [[ $level == "$no_gpu" ]] || fail "$name: it reports '$level', not $no_gpu, that there is no GPU"
    curl -fsS --data-binary @docs/samples/ankle-boot.png "localhost:$port/classify?top_k=1" |
        jq -e '.predictions[0].label == "Ankle boot"' >/dev/null || fail "$name: wrong answer from /classify"
    server=$started # follow the only child, down to the last one
    while child=$(pgrep -P "$server"); do
        [[ $(wc -w <<<"$child") == 1 ]] || fail "$name: several processes: $child"
        server=$child
        [[ $(readlink "/proc/$server/ns/pid") == "$(readlink /proc/self/ns/pid)" ]] || break
    done
    [[ $(stat -c %u:%g "/proc/$server") == "$expected" ]] || fail "$name: its user is $(stat -c %u:%g "/proc/$server")"
    [[ -n $(find "/proc/$server/root/cache" -type f -print -quit) ]] || fail "$name: nothing in its cache"
    chroot --userspec="$expected" "$root" /usr/bin/env -i "PCAE_PORT=$port" /opt/venv/bin/python -I -S /opt/health.py ||
        fail "$name: its HEALTHCHECK fails"

    begun=$SECONDS
    kill -TERM "$server"
    while kill -0 "$started" 2>/dev/null; do
        ((SECONDS - begun < 10)) || fail "$name: still running 10 s after SIGTERM"
        sleep 0.05
    done
    wait "$started" || status=$?
    started=
    [[ $status == 0 ]] || fail "$name: exit code $status after SIGTERM"
    echo "image: $name: ready after $waited ms; /classify, user $expected, cache, health and SIGTERM pass"
}

read_only() { # UID:GID VARIABLE
    contain "$1" PCAE_OPEN_ACCESS=true "$2" --
}
by_buildah() { # VARIABLE
    exec buildah "${store[@]}" run --isolation chroot --env PCAE_OPEN_ACCESS=true --env "$1" \
        "$container" -- "${entry[@]}"
}

status=0
(contain "$user" --) >"$work/server.log" 2>&1 || status=$?
if [[ $status != 2 ]] || ! grep -q -e --open-access "$work/server.log"; then
    fail "exit code $status without keys"
fi
echo "image: refuses to start without keys and without --open-access"

running "read-only root, PID 1" "$user" read_only "$user"
running "a user id without an account" 123456:0 read_only 123456:0
running "buildah run" "$user" by_buildah

status=0
(contain "$user" PCAE_OPEN_ACCESS=true "PCAE_PORT=$(free_port)" -- --device cuda:0) >"$work/server.log" 2>&1 || status=$?
[[ $status == 1 ]] || fail "exit code $status, not 1, for --device cuda:0 without a GPU"
[[ $(wc -l <"$work/server.log") == 1 ]] || fail "--device cuda:0 without a GPU is not refused in one line"
echo "image: $(tail -n 1 "$work/server.log")"
