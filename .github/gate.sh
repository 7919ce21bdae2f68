#!/usr/bin/env bash
# Evaluate MODEL on the CPU within MINUTES, compare with BASELINE, leave everything in OUT.
#   MODEL=… BASELINE=… [EVALUATE_OPTIONS=… COMPARE_OPTIONS=… MINUTES=30 OUT=dmlbench-run] bash .github/gate.sh
# Exits as `dmlbench compare` does; 124 where the evaluation took longer than MINUTES.
set -uo pipefail
out=${OUT:-dmlbench-run}
read -r -a evaluate <<< "${EVALUATE_OPTIONS:-}"
read -r -a compare <<< "${COMPARE_OPTIONS:-}"
finish() {
  if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "exit-code=$1" >> "$GITHUB_OUTPUT"; fi
  exit "$1"
}
mkdir -p "$out"
timeout "$((${MINUTES:-30} * 60))" python -m dmlbench evaluate --model "$MODEL" --device cpu --out "$out/run" \
  --csv "$out/rows.csv" ${evaluate[@]+"${evaluate[@]}"}
code=$?
[ "$code" -ne 124 ] || echo "Error: the evaluation took longer than ${MINUTES:-30} minutes; --limit makes it shorter" >&2
[ "$code" -eq 0 ] || finish "$code"
[ -n "${BASELINE:-}" ] || finish 0
python -m dmlbench compare "$BASELINE" "$out/run" --markdown "$out/compare.md" --json="$out/compare.json" \
  --junit "$out/compare.xml" ${compare[@]+"${compare[@]}"}
finish $?
