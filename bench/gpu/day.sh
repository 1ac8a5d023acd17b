#!/usr/bin/env bash
# Half an hour on a GPU: three calls of at most ten minutes each, each with its logs and JSON in a folder of its own.
#
#   bench/gpu/day.sh check OUT     facts; every op captured, twice, on a stream, on > 2^31 elements; the suite's GPU tests
#   bench/gpu/day.sh bench OUT     the hot benchmark by graph replay with ceilings and peers; memcheck on ten ops
#   bench/gpu/day.sh tune OUT      ncu on the hot kernels where it may read counters; tile sweeps of logits and attention
#   bench/gpu/day.sh dry OUT       all of it up to the first CUDA call, on any machine
#
# PYTHON names the interpreter (default python3); W2S_FAST_PACK a folder made by `make gpu-pack` (a CUDA build of the
# extension and a filled Triton cache: without it compiling takes most of the first call). Every step has a time limit,
# writes OUT/<step>.log and one line of OUT/steps.jsonl, and a step that fails does not stop the next.
set -uo pipefail
cd "$(dirname "$0")/../.."
call=${1:?usage: bench/gpu/day.sh check|bench|tune|dry OUT}
out=${2:?usage: bench/gpu/day.sh $call OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
root=$(pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${W2S_FAST_PACK:-}" ]; then
  W2S_FAST_PACK=$(cd "$W2S_FAST_PACK" && pwd)
  export TRITON_CACHE_DIR="$W2S_FAST_PACK/triton"
  "$python" -m bench.gpu.pack "$W2S_FAST_PACK" --settle
  for library in "$W2S_FAST_PACK"/w2s_fast/*.so; do [ -e "$library" ] && cp "$library" w2s_fast/; done
fi
mapfile -t gpu_tests < <(grep -l 'pytest\.mark\.gpu' tests/*.py)  # to collect the whole suite takes a minute
dry=0
[ "$call" = dry ] && dry=1
failed=0

# step NAME SECONDS COMMAND...: with a limit, its own log and a line of JSON
step() {
  local name=$1 limit=$2 start code
  shift 2
  if [ "$dry" = 1 ]; then
    printf 'would run for at most %4d s: %s: %s\n' "$limit" "$name" "$*"
    return
  fi
  start=$(date +%s)
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  printf '{"step": "%s", "code": %d, "seconds": %d}\n' "$name" "$code" $(($(date +%s) - start)) | tee -a "$out/steps.jsonl"
  [ "$code" = 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
}

check() {
  step facts 30 "$python" -m w2s_fast.cli info
  step smoke 150 "$python" -m bench.gpu.smoke
  step tests 400 "$python" -m pytest "${gpu_tests[@]}" -m gpu -q -n 8 --maxfail=200 -p no:cacheprovider
}

bench() {
  step hot 420 "$python" -m w2s_fast.cli bench --device cuda --out "$out" --rounds 7
  if command -v compute-sanitizer >/dev/null; then
    step memcheck 150 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m bench.gpu.smoke --few
  fi
}

tune() {
  step tiles 300 "$python" -m bench.gpu.tiles --out "$out/tiles.json"
  if command -v ncu >/dev/null; then
    step ncu 240 ncu --clock-control none --target-processes all --set basic --launch-count 60 \
      --csv --log-file "$out/ncu.csv" "$python" -m bench.gpu.smoke --few
  fi
}

case $call in
  check) check ;;
  bench) bench ;;
  tune) tune ;;
  dry)
    "$python" -m bench.gpu.smoke --dry || failed=1
    "$python" -m bench.gpu.tiles --dry || failed=1
    "$python" -m pytest "${gpu_tests[@]}" -m gpu -q --collect-only -p no:cacheprovider | tail -n 1
    check
    bench
    tune
    ;;
  *)
    echo "bench/gpu/day.sh: the first argument must be check, bench, tune or dry, got $call" >&2
    exit 2
    ;;
esac
exit $failed
