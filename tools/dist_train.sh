#!/usr/bin/env bash
# Train on several GPUs: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# The config's total_batch_size is divided by the GPUs; see docs/how-to/many-processes.md.
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "error: tools/dist_train.sh needs CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
tools=$(dirname "$0")
where=(--standalone)  # on a free port
if [ "${NNODES:-1}" != 1 ]; then
    where=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${PORT:-29500}")
fi
PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec torchrun "${where[@]}" --nproc_per_node="$2" \
    -- "$tools/train.py" "$1" --launcher pytorch "${@:3}"
