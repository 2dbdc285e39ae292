#!/usr/bin/env bash
# Train on several GPUs: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# Add --cfg-options train_dataloader.batch_size=B, the images of one GPU: batches are not multiplied.
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "error: tools/dist_train.sh needs CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
tools=$(dirname "$0")
# without lines of torch's sockets, which our own say in words
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
PYTHONPATH="$tools/..:${PYTHONPATH:-}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$2" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$tools/train.py" "$1" --launcher pytorch "${@:3}"
