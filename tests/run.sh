#!/bin/sh
# Every test: units first, then the notebooks' stored outputs, in the order in which a reader runs them, into an output root of
# their own. nbval compares the cells tagged nbval-check-output.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
[ $# -eq 0 ] || shift
VITNB_OUTPUTS=$(mktemp -d)
export VITNB_OUTPUTS
trap 'rm -rf "$VITNB_OUTPUTS"' EXIT
exec_notebooks="notebooks/finetune.ipynb notebooks/evaluate.ipynb notebooks/ablate.ipynb notebooks/infer.ipynb notebooks/anatomy.ipynb"
# shellcheck disable=SC2086
"$python" -m pytest -q --durations=10 --nbval-lax --nbval-current-env --nbval-cell-timeout=900 $exec_notebooks tests "$@"
