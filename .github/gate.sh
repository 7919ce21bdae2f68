#!/usr/bin/env bash
# Evaluate MODEL on the CPU within MINUTES, compare with BASELINE, leave everything in OUT.
#   MODEL=… BASELINE=… [EVALUATE_OPTIONS=… COMPARE_OPTIONS=… MINUTES=30 OUT=dmlbench-run] bash .github/gate.sh
# Options stand between spaces or on lines of their own; quotes and backslashes as in a shell, nothing is expanded.
# Exits as `dmlbench compare` does; 2 where an input is wrong, 124 where the evaluation took longer than MINUTES.
set -uo pipefail
out=${OUT:-dmlbench-run}
minutes=${MINUTES:-30}
finish() {
  if [ -n "${GITHUB_OUTPUT:-}" ]; then echo "exit-code=$1" >> "$GITHUB_OUTPUT"; fi
  exit "$1"
}
wrong() {
  echo "Error: $1" >&2
  finish 2
}
[[ "$minutes" =~ ^[1-9][0-9]{0,3}$ ]] || wrong "minutes is a whole number from 1 to 9999"
[ -n "${MODEL:-}" ] || wrong "model is empty"
words() { # the options in $1, each ended by a zero byte
  WORDS=$1 python -c 'import os, shlex, sys
try:
    words = shlex.split(os.environ["WORDS"])
except ValueError as error:
    sys.exit(f"Error: options: {error}")
sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words) + b".\0")'
}
evaluate=()
compare=()
while IFS= read -r -d '' word; do evaluate+=("$word"); done < <(words "${EVALUATE_OPTIONS:-}")
while IFS= read -r -d '' word; do compare+=("$word"); done < <(words "${COMPARE_OPTIONS:-}")
[ "${#evaluate[@]}" -gt 0 ] || wrong "evaluate-options cannot be read: a quotation mark without its end"
[ "${#compare[@]}" -gt 0 ] || wrong "compare-options cannot be read: a quotation mark without its end"
unset 'evaluate[${#evaluate[@]}-1]' 'compare[${#compare[@]}-1]' # the mark that all were read
mkdir -p -- "$out"
timeout "${minutes}m" python -m dmlbench evaluate --model "$MODEL" --device cpu --out "$out/run" \
  --csv "$out/rows.csv" ${evaluate[@]+"${evaluate[@]}"}
code=$?
[ "$code" -ne 124 ] || echo "Error: the evaluation took longer than $minutes minutes; --limit makes it shorter" >&2
[ "$code" -eq 0 ] || finish "$code"
[ -n "${BASELINE:-}" ] || finish 0
python -m dmlbench compare "$BASELINE" "$out/run" --markdown "$out/compare.md" --json="$out/compare.json" \
  --junit "$out/compare.xml" ${compare[@]+"${compare[@]}"}
finish $?
