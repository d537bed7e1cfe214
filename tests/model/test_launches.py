"""How many launches a card is given: counted on a CPU, with the choices of a card.

Kernels of others that only a card has are stand-ins, one launch each: torch's flash attention and RMSNorm, and SwiGLU
as torch.compile makes it. Values mean nothing here.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from sampled_gpts import OPTIONS, PROMPTS, TOKENIZER, VOCAB
from small_models import small_config, start

pytest.importorskip("triton")
from launches import Launches
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions import fused_bias_swiglu

from nemo_brain.core.groups import Output, Prompt, ScoredGroup
from nemo_brain.host import flash, options
from nemo_brain.model import attention, output_kernels, output_layer, rotary_kernel
from nemo_brain.model.prefix_attention import parts_of
from nemo_brain.objectives import make_objective
from nemo_brain.sampling import draws
from nemo_brain.sampling import sampler as sampler_module
from nemo_brain.sampling.sampler import Sampler
from nemo_brain.training.brain.passes import BRAInPasses, Scores, _ObjectiveLoss

LLAMA = dict(
    num_query_groups=1,
    params_dtype=torch.bfloat16,
    bf16=True,
    pipeline_dtype=torch.bfloat16,
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    add_bias_linear=False,
    apply_rope_fusion=True,
    bias_activation_fusion=True,
)


def attention_of(launches: Launches) -> SimpleNamespace:
    """In the place of ``torch.ops.aten``: of its flash attention the shapes."""

    def forward(q, *_, scale):
        return torch.zeros_like(q), torch.zeros(q.shape[1], len(q))

    def backward(d_out, q, k, v, *_, scale):
        return tuple(map(torch.zeros_like, (q, k, v)))

    calls = {"forward": forward, "backward": backward}
    return SimpleNamespace(**{f"_flash_attention_{name}": launches.one(name, call) for name, call in calls.items()})


def fused_norm(launches: Launches):
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(weight)
            return launches.one("norm", torch.clone)(hidden)

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            return launches.one("norm, back", lambda: (gradient.clone(), torch.zeros_like(weight)))()

    return lambda hidden, shape, weight, eps: Fused.apply(hidden, weight)


def as_on_a_card(launches: Launches) -> None:
    options.give_fused_rotary(rotary_kernel.apply_rotary)
    output_layer._kernels = lambda device, dtype: output_kernels
    flash.torch = SimpleNamespace(
        ops=SimpleNamespace(aten=attention_of(launches)), zeros=torch.zeros, uint64=torch.uint64
    )
    attention.find_merging = lambda q, k: flash.FlashKernel()
    torch.nn.functional.rms_norm = fused_norm(launches)
    fused_bias_swiglu.swiglu = launches.one("swiglu", lambda y: y.chunk(2, -1)[0].clone())
    fused_bias_swiglu.swiglu_back = launches.one("swiglu, back", lambda g, y: torch.cat([g, g], -1))


def micro_batch(layers: int, groups: int) -> int:
    """Launches of one, forward and back, into Megatron's gradient buffers."""
    start()
    launches = Launches()
    as_on_a_card(launches)
    scored = [
        ScoredGroup(
            Prompt(f"p{g}", "", [1, 2, 3 + g]),
            [Output([4] * length, True, "") for length in (5, 3, 4)],
            rewards=[0.0, 0.1, 0.2],
            proposal_logprobs=[-1.0] * 3,
            policy_logprobs=[-1.0] * 3,
            prior_logprobs=[-1.1] * 3,
        )
        for g in range(groups)
    ]
    config = small_config(num_layers=layers, **LLAMA)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), config.configure_model())
    passes = BRAInPasses(config, "shared_prefix", 256)
    planned = passes._plan(scored, split=False)
    assert len(planned.ranks[0]) == 1
    loss = _ObjectiveLoss(make_objective("brain"), Scores.of(scored, keep_truncated=True), None, 1.0)
    passes._run([chunk], planned, scored, (1.0,), loss)  # what is made at the first use
    parts_of.cache_clear()  # every micro-batch of a training has other lengths
    with launches:
        passes._run([chunk], planned, scored, (1.0,), loss)
    return launches.found.total()


def test_a_micro_batch_is_few_launches_however_many_groups_it_has():
    """The first version on a card launched 8,200 times in a step of 16 layers, block by block."""
    cases = [(1, 2), (1, 4), (2, 2)]
    counts = {(layers, groups): run_ranks(micro_batch, 1, layers, groups)[0] for layers, groups in cases}
    layer = counts[2, 2] - counts[1, 2]
    assert layer == 63 and counts[1, 2] - layer < 180
    assert counts[1, 2] == counts[1, 4]


def token(layers: int) -> int:
    """Launches of a token of all rows: what a CUDA graph of it has."""
    start()
    launches = Launches()
    as_on_a_card(launches)
    from nemo_brain.sampling import draw_kernels

    draws._kernels = lambda device: draw_kernels
    sampler_module.kernel_usable = lambda device, config: True
    config = small_config(num_layers=layers, seq_length=96, **LLAMA | {"vocab_size": VOCAB})
    counted = []

    def counts(call):
        with launches:
            call()
        counted.append(launches.found.total())
        launches.found.clear()

    sampler = Sampler([config.configure_model()], config, TOKENIZER, replace(OPTIONS, max_new_tokens=5))
    sampler._most_steps = 3
    sampler._repeat = lambda step, times, *_: [counts(step) for _ in range(times)]
    list(sampler.sample(PROMPTS, 1, 2))
    return max(counted)


def test_a_token_of_all_rows_is_few_launches():
    """The first version on a card launched 1,400 times for each, in 16 layers."""
    counts = {layers: run_ranks(token, 1, layers)[0] for layers in (1, 3)}
    layer = (counts[3] - counts[1]) / 2
    assert layer <= 15 and counts[1] - layer <= 18
