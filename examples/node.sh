#!/bin/bash
# The processes of one node, one per GPU, where nothing else starts them (Kubernetes, SkyPilot). On the first of two:
#
#     PET_NNODES=2 PET_NODE_RANK=0 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=node-0 examples/node.sh train run_dir=/shared/run
#
# The variables are torchrun's. Other than torchrun it passes SIGTERM and SIGUSR1 on, kills nothing that is saving, and
# ends with the processes' own code: 75 where they were interrupted, for whoever starts them again.
set -u
nodes=${PET_NNODES:-1} per_node=${PET_NPROC_PER_NODE:-1}
export GROUP_RANK=${PET_NODE_RANK:-0} WORLD_SIZE=$((nodes * per_node)) LOCAL_WORLD_SIZE=$per_node
export MASTER_ADDR=${PET_MASTER_ADDR:-127.0.0.1} MASTER_PORT=${PET_MASTER_PORT:-29500}

running=()
trap 'kill -TERM "${running[@]}"' TERM
trap 'kill -USR1 "${running[@]}"' USR1
for ((i = 0; i < per_node; i++)); do
  LOCAL_RANK=$i RANK=$((GROUP_RANK * per_node + i)) python -m nemo_brain "$@" trainer.num_nodes="$nodes" &
  running[$!]=$!
done

code=0
while ((${#running[@]})); do
  wait -n -p ended "${running[@]}"
  status=$?
  [ -n "${ended:-}" ] || continue # a signal, which has been passed on
  unset "running[$ended]"
  if ((status == 75)); then
    code=75
  elif ((status)); then
    # The others hear of a failure and end by themselves; after a process was killed they wait for it.
    for ((tenths = 0; tenths < 150; tenths++)); do
      kill -0 "${running[@]}" 2>/dev/null || exit $status
      sleep 0.1
    done
    kill -KILL "${running[@]}"
    exit $status
  fi
done
exit $code
