"""What becomes of each field of a GPT's configuration: our layers honour it, its value cannot matter, or it is refused.

A value that the layers would silently ignore is refused here, for every model, converted or from scratch. The fields
are those of NeMo 2.7's ``GPTConfig`` and Megatron-core 0.15's ``TransformerConfig``; those that later versions have
added may not be set.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is computed follows these, in our layers or in Megatron's around them.
HONOURED = _names("""
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size seq_length
    make_vocab_size_divisible_by share_embeddings_and_output_weights transformer_layer_spec
    layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm add_bias_linear add_qkv_bias
    gated_linear_unit activation_func activation_func_clamp_value glu_linear_offset bias_activation_fusion
    softmax_scale rotary_base rotary_percent rotary_interleaved seq_len_interpolation_factor no_rope_freq
    parallel_residual scale_factor low_freq_factor high_freq_factor old_context_len
    init_method_std embedding_init_method_std
    params_dtype pipeline_dtype fp16 bf16 enable_autocast autocast_dtype activation_func_fp8_input_store
    fp8 fp8_recipe fp8_param fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
    tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
""")

# No result depends on these, but for rounding: how and where it is computed, what a run sets itself, what is read with
# a refused value only, and what belongs to a loss, an attention or a generation that is not ours.
WITHOUT_EFFECT = _names("""
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage
    expert_model_parallel_size expert_tensor_parallel_size hierarchical_context_parallel_sizes cp_comm_type

    pipeline_model_parallel_comm_backend overlap_p2p_comm overlap_p2p_comm_warmup_flush batch_p2p_comm batch_p2p_sync
    use_ring_exchange_p2p deallocate_pipeline_outputs async_tensor_model_parallel_allreduce symmetric_ar_type
    tp_comm_overlap tp_comm_overlap_cfg tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
    tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
    tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend

    recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations
    cpu_offloading cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_activations cpu_offloading_weights
    cpu_offloading_double_buffering use_cpu_initialization clone_scatter_output_in_embedding
    disable_parameter_transpose_cache gradient_accumulation_fusion wgrad_deferral_limit

    apply_query_key_layer_scaling attention_softmax_in_fp32 attention_backend masked_softmax_fusion
    bias_dropout_fusion persist_layer_norm memory_efficient_layer_norm apply_rope_fusion fused_single_qkv_rope
    transformer_impl use_transformer_engine_full_layer_spec disable_bf16_reduced_precision_matmul deterministic_mode
    use_te_rng_tracker inference_rng_tracker

    init_method output_layer_init_method embedding_init_method output_chunk_mib
    timers barrier_with_L1_time finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
    test_mode config_logger_dir hetereogenous_dist_checkpoint forward_step_fn data_step_fn generation_config

    cross_entropy_loss_fusion cross_entropy_fusion_impl fp16_lm_cross_entropy parallel_output flash_decode
    mlp_chunks_for_prefill inference_sampling_seed

    window_attn_skip_freq mrope_section mtp_loss_scaling_factor fp4_recipe fp4_param use_fused_weighted_squared_relu
    mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
    cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps cuda_graph_scope
    moe_extended_tp moe_deepep_num_sms moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_layer_freq
    moe_ffn_hidden_size moe_router_load_balancing_type moe_router_topk moe_router_topk_limited_devices
    moe_router_padding_for_fp8 moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype moe_router_enable_expert_bias
    moe_router_bias_update_rate moe_router_force_load_balancing moe_grouped_gemm moe_use_legacy_grouped_gemm
    moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping moe_token_dispatcher_type
    moe_enable_deepep moe_per_layer_logging moe_expert_capacity_factor moe_pad_expert_input_to_capacity
    moe_token_drop_policy moe_layer_recompute moe_permute_fusion moe_router_fusion moe_apply_probs_on_input
""")

_DROPOUT = "with dropout the policy is not the law that was sampled from"
_ATTENTION = "the attention over packed rows has this one kind"
_LAYERS = "all layers are built alike, and end in one output layer"
_LENGTHS = "rows differ in length"
_GRADIENTS = "the passes compute all gradients of one mean over the groups in the backward pass itself"

# The values that our layers compute, and why no other.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_dropout": ((0.0,), _DROPOUT),
    "attention_dropout": ((0.0,), _DROPOUT),
    "window_size": ((None,), _ATTENTION),
    "softmax_type": (("vanilla",), _ATTENTION),
    "multi_latent_attention": ((False,), _ATTENTION),
    "fp8_dot_product_attention": ((False,), _ATTENTION),
    "fp8_multi_head_attention": ((False,), _ATTENTION),
    "context_parallel_size": ((1,), "packed groups do not support context parallelism"),
    "position_embedding_type": (("rope", "learned_absolute"), "a row's positions are given as one number each"),
    "normalization": (("LayerNorm", "RMSNorm"), "the layers know no other"),
    "num_moe_experts": ((None,), "experts are not supported: the router's statistics depend on the packing"),
    "mtp_num_layers": ((None,), _LAYERS),
    "heterogeneous_block_specs": ((False,), _LAYERS),
    "is_hybrid_model": ((False,), _LAYERS),
    "apply_residual_connection_post_layernorm": ((False,), "Megatron's layers do not compute it"),
    "fp32_residual_connection": ((False,), "hidden states have the weights' dtype"),
    "scatter_embedding_sequence_parallel": ((True,), "under sequence parallelism each rank has its part of a row"),
    "use_te_activation_func": ((False,), _LAYERS),
    "use_kitchen": ((False,), _LAYERS),
    "quant_recipe": ((None,), _LAYERS),
    "fp4": ((None,), "only trainer.fp8 is supported"),
    "variable_seq_lengths": ((True,), _LENGTHS),
    "enable_cuda_graph": ((False,), _LENGTHS),
    "external_cuda_graph": ((False,), _LENGTHS),
    "cuda_graph_impl": (("none",), _LENGTHS),
    "init_model_with_meta_device": ((False,), "weights are copied into the parameters"),
    "perform_initialization": ((True,), "with it Megatron marks how the weights are split"),
    "calculate_per_token_loss": ((False,), _GRADIENTS),
    "defer_embedding_wgrad_compute": ((False,), _GRADIENTS),
    "delay_wgrad_compute": ((False,), _GRADIENTS),
    "overlap_moe_expert_parallel_comm": ((False,), _GRADIENTS),
    "num_microbatches_with_partial_activation_checkpoints": ((None,), "micro-batches are recomputed alike"),
}


def _default(item: dataclasses.Field) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def check_fields(config: Any) -> None:
    """For a ``PackedGPTConfig``, whenever its values are settled: by its maker, and by NeMo once it knows the layout.

    Raises:
        ValueError: a field has a value that the layers would not compute with; names its key and the remedy.
    """
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"model.gpt.{item.name} (or model.options.{item.name})"
        if item.name in REFUSED:
            allowed, reason = REFUSED[item.name]
            if value not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise ValueError(f"{key} must be {wanted}, not {value!r}: {reason}; leave it out")
        elif item.name not in HONOURED | WITHOUT_EFFECT and value not in (_default(item), None):
            raise ValueError(f"{key} is not known to have the effect that it should: leave it out")
    if config.scale_factor is not None and config.position_embedding_type != "rope":
        raise ValueError("model.gpt.scale_factor scales rotary frequencies: set model.gpt.position_embedding_type=rope")
    alone = {"layernorm", "mlp"} & set(config.recompute_modules or ())
    if config.parallel_residual and config.recompute_granularity == "selective" and alone:
        raise ValueError(
            "model.options.recompute_modules: a model with parallel_residual recomputes core_attn, or whole "
            f"layers: set model.recompute=full instead of {' and '.join(sorted(alone))}"
        )
