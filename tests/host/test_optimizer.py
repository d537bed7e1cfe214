"""What decays, what a gradient that is not finite leaves alone, and what schedules and settings are on going on."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from nemo.lightning.pytorch import optim as nemo_optim
from ranks import run_ranks
from small_models import fill_gradients, start, trainable, weights_and_states
from small_runs import SMALL
from toy_runs import toy_config

from nemo_brain.host.optimizer import OptimizerGuard, clip_in_few_calls, fuse, keeping_settings, move_schedules
from nemo_brain.training.brain.run import run


class WeightDecays(pl.Callback):
    """Of each parameter in training, by the end of its name."""

    def on_train_start(self, trainer, module) -> None:
        groups = trainer.optimizers[0].param_groups
        decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        (chunk,) = trainer.strategy.chunks
        self.of = {
            name.rpartition("module.")[2]: decays.pop(id(parameter)) for name, parameter in chunk.named_parameters()
        }
        assert not decays


def weight_decays(run_dir: Path) -> dict[str, float]:
    biased = ("+model.gpt.add_qkv_bias=true", "+model.gpt.qk_layernorm=true", "model.gpt.normalization=LayerNorm")
    decays = WeightDecays()
    overrides = ("trainer.max_iterations=1", "optim.weight_decay=0.5", "model.gpt.num_layers=1", *biased)
    run(toy_config(*SMALL, f"run_dir={run_dir}", *overrides), callbacks=[decays])
    return decays.of


def test_matrices_decay_but_no_biases_and_no_norms(tmp_path):
    """With every version of Megatron-core, which says by names and shapes what does not decay."""
    (found,) = run_ranks(weight_decays, 1, tmp_path)
    layer = "decoder.layers.0"
    decayed = {
        "embedding.word_embeddings.weight",
        f"{layer}.self_attention.linear_qkv.weight",
        f"{layer}.self_attention.linear_proj.weight",
        f"{layer}.mlp.linear_fc1.weight",
        f"{layer}.mlp.linear_fc2.weight",
    }
    assert found == {name: 0.5 if name in decayed else 0.0 for name in found}
    assert len(found) == len(decayed) + 11  # five norms of two vectors, and one bias


def guarded(distributed: bool, tensor: int, value: float) -> None:
    """Steps with a finite gradient, with one that the last rank spoils, and with a finite one again."""
    start(tensor)
    wrapped, optimizer = trainable(distributed)
    guard = OptimizerGuard(optimizer.mcore_optimizer)
    states = []
    for spoiled in (False, True, False):
        fill_gradients(wrapped, value if spoiled and dist.get_rank() == dist.get_world_size() - 1 else 0.1)
        updated, norm, _ = optimizer.mcore_optimizer.step()
        assert updated and math.isfinite(float(norm)) != spoiled
        states.append(weights_and_states(wrapped, optimizer).clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2]) and states[2].isfinite().all()
    assert guard.skipped == 1


@pytest.mark.parametrize(
    ("ranks", "tensor", "distributed"),
    [(1, 1, False), (2, 2, False), (2, 1, True)],
    ids=["one process", "TP2", "DP2 distributed"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_changes_nothing(ranks, tensor, distributed, value):
    run_ranks(guarded, ranks, distributed, tensor, value)


def unguarded() -> bool:
    start()
    wrapped, optimizer = trainable(distributed=False)
    fill_gradients(wrapped, math.nan)
    optimizer.mcore_optimizer.step()
    return bool(weights_and_states(wrapped, optimizer).isfinite().all())


def test_megatron_alone_lets_it_into_the_weights():
    assert run_ranks(unguarded, 1) == [False]


def stepped(fused: bool, distributed: bool) -> torch.Tensor:
    """Weights and states after steps with gradients of several sizes, some of which are clipped."""
    start()
    wrapped, optimizer = trainable(distributed)
    if fused:
        fuse([optimizer])
        groups = optimizer.mcore_optimizer.param_groups
        assert all(group["fused"] for group in groups), groups
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1.0, 1e-6, 30.0):
        for buffer in wrapped.buffers:
            buffer.grad_data.copy_(scale * torch.randn(buffer.grad_data.shape, generator=generator))
        optimizer.mcore_optimizer.step()
    return weights_and_states(wrapped, optimizer)


@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed"])
def test_the_fused_step_is_the_unfused_one(distributed):
    (fused,), (plain,) = (run_ranks(stepped, 1, fused, distributed) for fused in (True, False))
    # The same formula, rounded in another order in each of four steps; eps of Adam is 1e-8, weights are of order 1.
    torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-5)
    assert not torch.equal(fused, plain), "it is another kernel"


def test_a_step_count_from_a_checkpoint_goes_to_where_the_fused_kernel_counts():
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    adam = torch.optim.AdamW([parameter])
    optimizer = SimpleNamespace(
        mcore_optimizer=SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)]),
        param_groups=adam.param_groups,
    )
    for fused, device in ((False, "cpu"), (True, "meta")):
        if fused:
            fuse([optimizer])
        with keeping_settings([optimizer]):
            adam.param_groups[0]["fused"] = None  # as the checkpoint has it
            adam.state[parameter]["step"] = torch.tensor(7.0)
        assert adam.param_groups[0]["fused"] is (True if fused else None)
        assert adam.state[parameter]["step"].device.type == device


def test_clipping_in_few_calls_gives_megatrons_numbers():
    """Of its own substitutes, which read the device once per tensor."""
    generator = torch.Generator().manual_seed(4)
    gradients = [torch.randn(size, generator=generator) * 10**power for power, size in enumerate((1, 7, 4096, 100_000))]
    flag = torch.zeros(1, dtype=torch.int32)
    theirs, _ = local_multi_tensor_l2_norm(0, flag, [gradients], False)
    scaled = [gradient.clone() for gradient in gradients]
    local_multi_tensor_scale(0, flag, [scaled, scaled], 0.3)
    clip_in_few_calls()
    ours, _ = clip_grads.l2_norm_impl(0, flag, [gradients], False)
    clip_grads.multi_tensor_scale_impl(0, flag, [gradients, gradients], 0.3)
    assert torch.equal(ours, theirs) and all(map(torch.equal, gradients, scaled))
    on_device = [gradient.to("meta") for gradient in gradients]  # a read would fail
    norm, _ = clip_grads.l2_norm_impl(0, flag, [on_device], False)
    clip_grads.multi_tensor_scale_impl(0, flag, [on_device, on_device], 0.3)
    assert norm.device.type == "meta" and norm.shape == (1,)
    with pytest.raises(RuntimeError):
        local_multi_tensor_l2_norm(0, flag, [on_device], False)


STEPS = 12
SCHEDULES = {
    "CosineAnnealing": {"warmup_steps": 2, "constant_steps": 0, "min_lr": 1e-3},
    "CosineAnnealing, constant at the end": {"warmup_steps": 2, "constant_steps": 3, "min_lr": 1e-3},
    "InverseSquareRootAnnealing": {},
    "NoamAnnealing": {"d_model": 64, "warmup_steps": 2},
    "PolynomialDecayAnnealing": {"power": 2.0, "cycle": True},
    "PolynomialHoldDecayAnnealing": {"power": 2.0},
    "SquareAnnealing": {"min_lr": 1e-3},
    "SquareRootAnnealing": {},
    "WarmupAnnealing": {"warmup_steps": None, "warmup_ratio": 0.25},
    "WarmupHoldAnneal": {"warmup_ratio": 0.2, "hold_ratio": 0.4, "decay_schedule": "one_minus_square_root"},
    "WarmupHoldPolicy": {"warmup_steps": 2, "hold_steps": 3},
    "WarmupPolicy": {"warmup_steps": 4},
}
# They fail at their first step, whatever they are given.
UNUSABLE = {"NoamHoldAnnealing", "T5InverseSquareRootAnnealing"}


def test_every_schedule_of_nemos_is_here():
    offered = {name.removesuffix("Scheduler") for name in dir(nemo_optim) if name.endswith("Scheduler")}
    assert offered - UNUSABLE == {name.partition(",")[0] for name in SCHEDULES}


def schedule(name: str, steps: int) -> SimpleNamespace:
    """As Lightning has it, with the optimizer that it moves."""
    module = getattr(nemo_optim, f"{name.partition(',')[0]}Scheduler")(**SCHEDULES[name])
    module.max_steps = steps
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return SimpleNamespace(optimizer=optimizer, **module.scheduler(None, optimizer)["lr_scheduler"])


def rates(at: SimpleNamespace, count: int) -> list[float]:
    """Of the next steps."""
    used = []
    for _ in range(count):
        used.append(at.optimizer.param_groups[0]["lr"])
        at.scheduler.step()
    return used


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_goes_on_has_the_rates_of_the_uninterrupted_one_of_its_length(name):
    """To the last bit, from any step on."""
    whole = rates(schedule(name, STEPS), STEPS)
    assert len(set(whole)) > 2
    for step in range(1, STEPS):
        other = schedule(name, STEPS)
        (restored,) = move_schedules([other], step)
        other.scheduler.load_state_dict(restored)
        assert rates(other, STEPS - step) == whole[step:]
