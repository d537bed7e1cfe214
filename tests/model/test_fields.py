"""Every field of a GPT's configuration is honoured, cannot matter, or is refused; none is silently ignored.

Shapes: S positions of a row, V vocabulary columns, H hidden.
"""

from __future__ import annotations

import dataclasses

import megatron.core
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from packaging.version import Version
from ranks import run_ranks

from nemo_brain.host.layers import HAVE_TRANSFORMER_ENGINE, Norm
from nemo_brain.model.fields import HONOURED, REFUSED, WITHOUT_EFFECT
from nemo_brain.model.gpt import PackedGPTConfig, PackedGPTModel
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import load_weights

VOCAB, S = 37, 12
ROW_1S = torch.arange(S)[None] * 5 % VOCAB
SMALL = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": S,
    "vocab_size": VOCAB,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "init_method_std": 0.3,
    "make_vocab_size_divisible_by": 1,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
}


def test_every_field_has_one_rule():
    """Those that Megatron-core has added since 0.15 have none: they are refused once they are set."""
    names = [item.name for item in dataclasses.fields(PackedGPTConfig)]
    rules = {name: sum(name in rule for rule in (HONOURED, WITHOUT_EFFECT, REFUSED)) for name in names}
    fewest = 1 if Version(megatron.core.__version__) < Version("0.16a0") else 0
    assert {name: count for name, count in rules.items() if not fewest <= count <= 1} == {}
    assert (HONOURED | WITHOUT_EFFECT | REFUSED.keys()) - set(names) == set()


@pytest.mark.parametrize("name", REFUSED)
def test_another_value_is_refused_with_its_key(name):
    for value in (True, False, 2, "other"):
        if value not in REFUSED[name][0]:
            with pytest.raises(
                ValueError, match=rf"^model\.gpt\.{name} \(or model\.options\.{name}\) must be .*it out"
            ):
                PackedGPTConfig(**{**SMALL, name: value})


def test_what_is_left_out_and_what_is_asked_for_are_accepted():
    defaults = PackedGPTConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    for name, (allowed, _) in REFUSED.items():
        assert getattr(defaults, name) in allowed, name
        for value in allowed:
            PackedGPTConfig(**{**SMALL, name: value})


def test_a_field_of_another_version_is_refused_once_it_is_set():
    @dataclasses.dataclass
    class Newer(PackedGPTConfig):
        softcap: float = 0.0
        softcapped: list = dataclasses.field(default_factory=list)

    Newer(**SMALL)
    with pytest.raises(ValueError, match=r"model\.gpt\.softcap .*leave it out"):
        Newer(**SMALL, softcap=30.0)
    with pytest.raises(ValueError, match=r"model\.gpt\.softcapped .*leave it out"):
        Newer(**SMALL, softcapped=[1])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"scale_factor": 8.0, "position_embedding_type": "learned_absolute"}, "set model.gpt.position_embedding_type"),
        (
            {"parallel_residual": True, "recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            "set model.recompute=full instead of mlp",
        ),
    ],
)
def test_fields_that_exclude_each_other_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        PackedGPTConfig(**{**SMALL, **fields})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_zero_centred_weights_are_added_to_one(normalization, dtype):
    config = PackedGPTConfig(
        **{**SMALL, "normalization": normalization, "params_dtype": dtype, "layernorm_zero_centered_gamma": True}
    )
    norm = Norm(config, 16, eps=1e-3)
    assert not norm.weight.any(), "the identity"
    generator = torch.Generator().manual_seed(0)
    hidden_SH = torch.randn(S, 16, generator=generator).to(dtype)
    for parameter in norm.parameters():
        # Small enough that bfloat16 cannot tell their sum with 1 from 1.
        parameter.data.copy_(1e-3 * torch.randn(16, generator=generator))
    x_SH = hidden_SH.double()
    if norm.bias is not None:
        x_SH = x_SH - x_SH.mean(-1, keepdim=True)
    expected_SH = x_SH / (x_SH.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + norm.weight.double())
    if norm.bias is not None:
        expected_SH += norm.bias.double()
    out_SH = norm(hidden_SH)
    assert out_SH.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(out_SH, expected_SH.to(dtype)), "rounded once, at the end"
    else:
        torch.testing.assert_close(out_SH.double(), expected_SH, rtol=1e-6, atol=1e-6)  # fp32 rounding


# Changes of a model's configuration; what is computed must change for the first, and must not for the second.
CHANGING = {
    "softmax_scale": 0.8,
    "rotary_interleaved": True,
    "rotary_percent": 0.5,
    "rotary_base": 50,
    "seq_len_interpolation_factor": 3.0,
    "no_rope_freq": [1, 0],
    "layernorm_epsilon": 0.5,
    "normalization": "LayerNorm",
    "qk_layernorm": True,
    "add_qkv_bias": True,
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": F.silu,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 0.1,
    "kv_channels": 8,
    "num_query_groups": 1,
    "position_embedding_type": "learned_absolute",
    "share_embeddings_and_output_weights": False,
}
UNCHANGING = {
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "fp16_lm_cross_entropy": True,
    "parallel_output": False,
    "bias_dropout_fusion": True,
}


def start() -> None:
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def build(fields: dict) -> PackedGPTModel:
    model = PackedGPTConfig(**{**SMALL, **fields}).configure_model(None, pre_process=True, post_process=True).eval()
    load_weights([model], RandomWeights({**SMALL, **fields}, VOCAB, tokenizer=None, seed=3))
    return model


def logits(model: PackedGPTModel) -> torch.Tensor:
    """Of ROW, [S, V]."""
    return model(ROW_1S, torch.arange(S)[None], torch.tensor([[S]]), torch.arange(S))


def logits_of_both(fields: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """By our model and by Megatron's own, with the same weights, all of them random."""
    ours = build(fields)
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():  # norms and biases too
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    config = ours.config
    theirs = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization),
        vocab_size=VOCAB,
        max_sequence_length=S,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
        position_embedding_type=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        seq_len_interpolation_factor=config.seq_len_interpolation_factor,
    ).eval()
    weights = dict(ours.named_parameters())
    assert weights.keys() == dict(theirs.named_parameters()).keys()
    theirs.load_state_dict(weights, strict=False)
    ahead_11SS = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
    return logits(ours), theirs(ROW_1S, torch.arange(S)[None], ahead_11SS)[0]


def compared() -> None:
    start()
    with torch.no_grad():
        base_SV, _ = logits_of_both({})
        for name, value in {**CHANGING, **UNCHANGING}.items():
            ours_SV, theirs_SV = logits_of_both({name: value})
            # fp32, other kernels; logits are of order ten.
            assert (ours_SV - theirs_SV).abs().max() < 1e-4, name
            assert ((ours_SV - base_SV).abs().max() > 1e-2) == (name in CHANGING), name


@pytest.mark.skipif(HAVE_TRANSFORMER_ENGINE, reason="the reference has the parameters of Megatron's local layers")
def test_what_is_computed_is_what_megatron_s_own_model_computes():
    run_ranks(compared, 1)


def zero_centred() -> tuple[torch.Tensor, torch.Tensor]:
    start()
    with torch.no_grad():
        return tuple(logits(build({"layernorm_zero_centered_gamma": centred})) for centred in (False, True))


def test_a_zero_centred_model_from_scratch_starts_as_one_that_is_not():
    ((plain_SV, centred_SV),) = run_ranks(zero_centred, 1)
    assert plain_SV.std() > 0.1 and torch.equal(plain_SV, centred_SV)
