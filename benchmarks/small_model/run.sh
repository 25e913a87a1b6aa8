#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train, then compare: run.sh TEXT OUTPUT [117m|tiny]. At most 10 minutes for 117m, mostly 9.
# The scripts end by themselves in time; `timeout` is for a device that hangs, with 30 s
# for imports, which the scripts do not count.
set -euo pipefail
text=$1 output=$2 size=${3:-117m}
here=$(dirname "$0")
python=${PYTHON:-python3}
export PYTHONPATH=$here/../..:$here/..
if [ "$size" = tiny ]; then
  training=30 train=(--eager) comparing=300 compare=(--windows 4 --samples 2 --workers 2)
else
  training=300 train=() comparing=225 compare=()
fi
timeout -k 5 $((training + 30)) "$python" "$here/train.py" "$text" "$output/model" \
  --size "$size" --seconds "$training" "${train[@]}"
timeout -k 5 $((comparing + 30)) "$python" "$here/compare.py" "$text" "$output/model" \
  "$output/comparison.json" --seconds "$comparing" "${compare[@]}"
