#!/bin/sh
# Lensmesh on this machine, from a fresh clone: sets itself up, then lints, tests, or runs a mesh.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/.venv
constraints=$root/deploy/constraints/cpu.txt

usage() {
    cat >&2 <<END
usage: sh deploy/local.sh COMMAND [ARGUMENTS]
  setup   make .venv and install the project into it; find or install nats-server
  lint    ruff, mypy, import-linter, buf lint, buf breaking
  test    every test; the lines that unit tests and two files more run are counted: 70 % or more
  demo    run the main job on a mesh of its own (arguments: lensmesh demo --help)
  up      run a mesh until Ctrl-C (arguments: lensmesh up --help)
END
    exit 2
}

say() { printf 'deploy/local.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

find_python() {
    for name in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; install it and name it in PYTHON=/path/to/python3"
}

find_nats_server() {
    [ -z "${LENSMESH_NATS_URL:-}" ] || return 0
    PATH=$PATH:/usr/local/sbin:/usr/sbin command -v nats-server >/dev/null && return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing nats-server with apt-get"
        { apt-get install -y nats-server || { apt-get update && apt-get install -y nats-server; }; } >&2 && return 0
    fi
    fail "nats-server is needed: sudo apt-get install nats-server (or set LENSMESH_NATS_URL to a running one)"
}

# What the installation depends on; the same line means that there is nothing to do.
stamp() { cat "$root/pyproject.toml" "$constraints" | cksum; }

setup() {
    find_nats_server
    if [ -x "$venv/bin/lensmesh" ] && [ "$(cat "$venv/setup.stamp" 2>/dev/null)" = "$(stamp)" ]; then
        return
    fi
    python=$(find_python) || exit 1
    say "setting up $venv (once)"
    "$python" -m venv "$venv" >&2 || fail "$python cannot make a virtual environment; Debian, Ubuntu: apt-get install python3-venv"
    # torch first: whichever build of the pin is found, what depends on it then keeps it.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" torch >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" \
        -e "$root[device,local,dev]" >&2
    stamp >"$venv/setup.stamp"
}

# The newest commit on main that this one can be compared with.
main_commit() {
    head=$(git -C "$root" rev-parse --verify --quiet HEAD) || return 0
    for ref in origin/main main; do
        commit=$(git -C "$root" rev-parse --verify --quiet "$ref^{commit}") || continue
        [ "$commit" != "$head" ] || commit=$(git -C "$root" rev-parse --verify --quiet "HEAD^") || return 0
        echo "$commit"
        return
    done
}

lint_protos() {
    "$venv/bin/python" protos/build.py build/gen
    "$venv/bin/buf" lint build/image.binpb --config buf.yaml --path lensmesh
    commit=$(main_commit)
    if [ -z "$commit" ] || ! git cat-file -e "$commit:protos/build.py" 2>/dev/null; then
        say "buf breaking: main has no protos to compare with"
        return
    fi
    rm -rf build/main
    mkdir -p build/main
    git archive "$commit" protos | tar -x -C build/main
    "$venv/bin/python" build/main/protos/build.py build/main/gen
    "$venv/bin/buf" breaking build/image.binpb --against build/main/build/image.binpb --config buf.yaml --path lensmesh
}

lint() {
    cd "$root"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    "$venv/bin/lint-imports"
    lint_protos
}

run_tests() {
    cd "$root"
    # Two workers on two cores: with more threads each, torch's spin while they wait, for three times the CPU time.
    export OMP_NUM_THREADS=1
    # To count lines costs up to 70 % more time, so it is done for a part of the tests.
    counted="tests/unit tests/wire/test_gateway_http.py tests/wire/test_registry_groups.py"
    # By name, so that the files that take minutes, of few tests each, are not left to the end.
    # shellcheck disable=SC2046,SC2086
    "$venv/bin/python" -m pytest tests $(printf ' --ignore=%s' $counted) -n 2 --dist loadfile --no-loadscope-reorder
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pytest $counted -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=70
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
    setup | lint | test | demo | up) setup ;;
    *) usage ;;
esac
case $command in
    lint) lint ;;
    test) run_tests ;;
    demo | up) exec "$venv/bin/lensmesh" "$command" "$@" ;;
esac
