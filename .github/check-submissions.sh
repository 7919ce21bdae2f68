#!/usr/bin/env bash
# Check what a checkout does to the board since it left a commit: its paths, each new bundle, the board's files.
#   bash .github/check-submissions.sh [COMMIT]      (default origin/main; LEVEL=0..4, default 3)
# Run at the root of a checkout, with dmlbench installed. Exits 1 where anything is refused.
set -euo pipefail
exec python -m dmlbench leaderboard admit "${1:-origin/main}" --level "${LEVEL:-3}" --fetch --device cpu
