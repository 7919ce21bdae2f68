#!/usr/bin/env bash
# Validate every submission that differs from a commit, and the board's files.
#   bash .github/check-submissions.sh [COMMIT]      (default origin/main; LEVEL=0..4, default 2)
# Run at the root of a checkout, with dmlbench installed. Exits 1 where anything is refused.
set -uo pipefail
base=${1:-origin/main}
changed=$(git diff --name-only "$base" -- leaderboard/submissions) || exit 2
added=$(git ls-files --others --exclude-standard -- leaderboard/submissions)
failed=0
while IFS= read -r name; do
  folder=leaderboard/submissions/$name
  if [ ! -d "$folder" ] || [ -f "$folder/claims.csv" ]; then continue; fi # gone, or checked by the build below
  python -m dmlbench validate "$folder" --level "${LEVEL:-2}" --board leaderboard --device cpu || failed=1
done < <(printf '%s\n%s\n' "$changed" "$added" | cut -d/ -f3 | sort -u | sed '/^$/d')
python -m dmlbench leaderboard build --check || failed=1
exit "$failed"
