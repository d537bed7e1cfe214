"""The Megatron GPT that BRAIn trains: a megatron-core GPTModel over packed rows, and the NeMo config that builds it.

Shapes: S positions of a row, T positions with a target, E temperatures, V vocabulary columns of this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel as MCoreGPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_brain.host.gpt import fp8_multiple, logits, padded_vocab_size, replace_output_layer, scale_rotary
from nemo_brain.host.layers import block_spec
from nemo_brain.model.attention import GroupAttention
from nemo_brain.model.fields import check_fields
from nemo_brain.model.output_layer import linear_logprobs
from nemo_brain.model.parameters import is_adapter


class PackedGPTModel(MCoreGPTModel):
    """GPTModel over packed rows: positions are given, and the output layer sees only the positions asked for.

    Args:
        real_vocab_size: columns from there on are padding and have no probability.
        **options: MCoreGPTModel's own.
    """

    def __init__(self, *, real_vocab_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.real_vocab_size = real_vocab_size
        if self.post_process:
            # With sequence parallelism the row is gathered before it (see trunk).
            replace_output_layer(self, self._output)

    def forward(
        self,
        tokens_1S: torch.Tensor,
        positions_1S: torch.Tensor,
        attention: Any,
        select_T: torch.Tensor,
        targets_T: torch.Tensor | None = None,
        temperatures: tuple[float, ...] = (1.0,),
    ) -> torch.Tensor:
        """One chunk's forward pass over one packed row.

        Args:
            tokens_1S, positions_1S: the row.
            attention: the row's layout tensor, or a KVCache.
            select_T: the positions whose next-token distribution is wanted.
            targets_T: the tokens predicted there.
            temperatures: the log-probs are returned at each of these.

        Returns:
            On the last stage log-probs [E, T] (fp32) of the targets, or logits [T, V] without targets; elsewhere the
            hidden states for the next stage.
        """
        hidden = self.trunk(tokens_1S, positions_1S, attention)
        if not self.post_process:
            return hidden
        return self.output_layer(hidden.squeeze(1).index_select(0, select_T), targets_T, temperatures)

    def trunk(self, tokens_1S: torch.Tensor, positions_1S: torch.Tensor, attention: Any) -> torch.Tensor:
        """The row's hidden states [S, 1, H]; on the last stage normalised and, under sequence parallelism, gathered."""
        hidden = self.embedding(input_ids=tokens_1S, position_ids=positions_1S) if self.pre_process else None
        if hidden is not None and torch.is_grad_enabled() and self.config.recompute_granularity == "full":
            # Megatron recomputes a layer in the backward pass of its input, which that of a frozen embedding lacks.
            hidden.requires_grad_()
        rotary = None
        if self.position_embedding_type == "rope":
            rotary = self.rotary_pos_emb(self.max_sequence_length)[positions_1S[0]]
        hidden = self.decoder(hidden_states=hidden, attention_mask=attention, rotary_pos_emb=rotary)
        if self.post_process and self.config.sequence_parallel:
            # The selection needs the whole row; from here on the output layer is plainly tensor-parallel.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Megatron's; of a model with adapters their part alone, because all else stays the start model's."""
        state = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if is_adapter(key)} or state

    def _output(
        self, hidden_TH: torch.Tensor, targets_T: torch.Tensor | None, temperatures: tuple[float, ...]
    ) -> torch.Tensor:
        """What ``output_layer`` computes: log-probs [E, T] of the targets, or logits [T, V] without targets."""
        if self.share_embeddings_and_output_weights:
            weight_VH = self.shared_embedding_or_output_weight()
        else:
            weight_VH = self.output_layer.weight
        if targets_T is None:
            return logits(self, hidden_TH, weight_VH)
        group = parallel_state.get_tensor_model_parallel_group()
        chunk = None if self.config.output_chunk_mib is None else self.config.output_chunk_mib * 2**20
        return linear_logprobs(hidden_TH, weight_VH, targets_T, group, temperatures, self.real_vocab_size, chunk)


def layer_spec(config: PackedGPTConfig, vp_stage: int | None = None) -> Any:
    """Transformer Engine's layers where it is installed, Megatron-core's own otherwise; with our core attention."""
    return block_spec(config, GroupAttention, config.parallel_residual, vp_stage)


@dataclass
class PackedGPTConfig(GPTConfig):
    """A NeMo GPTConfig that builds a ``PackedGPTModel``. ``vocab_size`` is the real, unpadded one.

    Other defaults than NeMo's: there is no dropout, and rows differ in length, which Megatron ties to a dispatcher of
    experts even for dense models.

    parallel_residual: attention and MLP of a layer both read its input, as in GPT-NeoX.
    scale_factor: rotary frequencies are scaled as in Llama 3.1, by this factor; the next three fields are read with it
        only. Their names and defaults are those of NeMo's Llama31Config.
    output_chunk_mib: of logits that exist at a time, see ``output_layer.linear_logprobs``; None: its default.

    Raises:
        ValueError: a field has a value that the layers would not compute with; see ``fields``.
    """

    model_class: ClassVar[type[PackedGPTModel]] = PackedGPTModel
    transformer_layer_spec: Any = layer_spec
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    variable_seq_lengths: bool = True
    moe_token_dispatcher_type: str = "alltoall"
    parallel_residual: bool = False
    scale_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192
    output_chunk_mib: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.output_chunk_mib is not None and self.output_chunk_mib < 1:
            raise ValueError(f"model.options.output_chunk_mib must be at least 1, not {self.output_chunk_mib}")
        super().__post_init__()

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many positions: for sequence parallelism, and for FP8 products."""
        shards = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return shards * fp8_multiple(self)

    def configure_model(
        self,
        tokenizer: Any = None,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> PackedGPTModel:
        """Builds this rank's (virtual) pipeline chunk; arguments as in NeMo's GPTConfig."""
        stage = dict(ignore_virtual=False, vp_stage=vp_stage or 0)
        model = self.model_class(
            config=self,
            transformer_layer_spec=self.transformer_layer_spec(self, vp_stage=vp_stage or 0),
            vocab_size=padded_vocab_size(self),
            real_vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            seq_len_interpolation_factor=self.seq_len_interpolation_factor,
            pre_process=parallel_state.is_pipeline_first_stage(**stage) if pre_process is None else pre_process,
            post_process=parallel_state.is_pipeline_last_stage(**stage) if post_process is None else post_process,
            scatter_embedding_sequence_parallel=self.scatter_embedding_sequence_parallel,
            vp_stage=vp_stage or 0,
        )
        if self.position_embedding_type == "rope" and self.scale_factor is not None:
            scaling = (self.scale_factor, self.low_freq_factor, self.high_freq_factor, self.old_context_len)
            scale_rotary(model, *scaling)
        return model
