"""TRL's side of the `trl` table, in an environment of its own: one trainer, driven line by line over stdin and stdout.

    python -P benchmarks/trl_worker.py rloo MODEL_DIRECTORY < requests.jsonl

Each request is one JSON object: ``{"do": "load", "prompt": ids, "outputs": [ids, ...]}`` prepares a batch from given
tokens; ``{"do": "step"}`` makes an optimizer step on it; ``{"do": "iterate", "new_tokens": count}`` generates, scores
and makes a step; the answers are JSON objects too.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

COMMON = dict(
    output_dir=tempfile.mkdtemp(),
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    learning_rate=1e-5,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
)


class _GivenTokens:
    """Prompts are token ids in the clear, and outputs are given ones where there are any."""

    given: list | None = None

    def _tokenize_prompts(self, prompts):
        return [[int(token) for token in prompt.split()] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        if self.given is None:
            return super()._generate_single_turn(*args, **kwargs)
        return (self.given, None) if isinstance(self, GRPOTrainer) else self.given

    def _prepare_inputs(self, inputs):
        return inputs  # scored already; the trainers would generate here


class _GRPO(_GivenTokens, GRPOTrainer):
    pass


class _RLOO(_GivenTokens, RLOOTrainer):
    pass


class Worker:
    """One trainer of one kind: dpo, grpo or rloo."""

    def __init__(self, kind: str, model: str):
        self.kind = kind
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = model
        self.trainer = None

    def load(self, prompt: list[int], outputs: list[list[int]]) -> dict:
        """Prepares what the step takes: for RLOO that includes its scoring passes."""
        if self.trainer is None:
            self.trainer = self._trainer(len(outputs), len(outputs[0]))
            self.trainer.create_optimizer()
            self.trainer.optimizer = self.trainer.accelerator.prepare(self.trainer.optimizer)
        self.trainer.current_gradient_accumulation_steps = 1  # set by Trainer.train
        self.trainer.model.train()
        if self.kind == "dpo":
            example = {"prompt_ids": prompt, "chosen_ids": outputs[0], "rejected_ids": outputs[1]}
            example |= {"ref_chosen_logps": -100.0, "ref_rejected_logps": -101.0}
            self.inputs = self.trainer.data_collator([example])
        else:
            self.text = " ".join(map(str, prompt))
            self.trainer.given = outputs
            self._score(len(outputs))
        return {"rows": len(outputs)}

    def _score(self, outputs: int) -> None:
        rows = [{"prompt": self.text, "completion": ""} for _ in range(outputs)]
        self.inputs = self.trainer._generate_and_score_completions(rows)

    def step(self) -> dict:
        """One optimizer step on the batch, as Trainer.train makes it: forward, backward, clipping, AdamW."""
        trainer = self.trainer
        inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in self.inputs.items()}
        trainer.training_step(trainer.model, inputs, num_items_in_batch=None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return {}

    def iterate(self, new_tokens: int) -> dict:
        """Generation of a whole group, scoring, and a step."""
        self.trainer.given = None
        self.trainer.generation_config.max_new_tokens = new_tokens
        self.trainer.generation_config.min_new_tokens = new_tokens
        self._score(self.trainer.num_generations)
        self.step()
        return {"tokens": int(self.inputs["completion_mask"].sum())}

    def _trainer(self, n: int, length: int):
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, attn_implementation="sdpa")
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        if self.kind == "dpo":
            args = DPOConfig(**COMMON, per_device_train_batch_size=1, precompute_ref_log_probs=True, max_length=None)
            return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=self.tokenizer)
        options = dict(
            **COMMON,
            per_device_train_batch_size=n,
            num_generations=n,
            max_completion_length=length,
            # Both score the outputs with a frozen reference model, as BRAIn does with its prior.
            beta=0.05,
        )
        kind, config = (_GRPO, GRPOConfig) if self.kind == "grpo" else (_RLOO, RLOOConfig)
        return kind(
            model,
            reward_funcs=lambda completions, **_: [float(i % 3) for i in range(len(completions))],
            args=config(**options),
            train_dataset=Dataset.from_list([{"prompt": "1 2 3"}] * n),
            processing_class=self.tokenizer,
        )


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        request = json.loads(line)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, started = _status("VmRSS"), time.perf_counter()
        answer = getattr(worker, request.pop("do"))(**request)
        answer |= {"seconds": time.perf_counter() - started, "peak": _status("VmHWM") - before}
        answer["versions"] = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
