"""Where the package reaches into its host: NeMo, Lightning, Megatron-core, and what torch does on their behalf.

Every name of theirs that is private, replaced while a run goes on, or known to differ between their versions is used in
this room alone, and ``tests/host`` checks that it does what is relied on. So another version of the host is a change
here, and nowhere else. Their public interfaces (parallel_state, GPTModel, MegatronStrategy, ...) are used everywhere.

- ``versions``: which host versions are known to work, and which not to.
- ``cpu``: what Megatron and NeMo need on a machine without CUDA.
- ``distributed``: the process group of a run, and Megatron's groups.
- ``options``: settings of theirs without which they fail or go wrong under us.
- ``layers``, ``parallel_residual``: transformer layers, with Transformer Engine and without.
- ``gpt``: what a GPT is built with: padded vocabulary, scaled rotary frequencies, an output layer of ours.
- ``adapters``: NeMo's LoRA matrices for a layer.
- ``flash``: torch's attention kernel, with the output and log-sums of more than one call.
- ``pipeline``: messages between stages, of lengths that both sides know.
- ``send``: tensors on their way to a card.
- ``second_model``: a model beside the one that NeMo trains.
- ``trainer``: a training without a last step.
- ``optimizer``: no step where the gradient is not finite.
- ``checkpointing``: saved by the ranks themselves, and loaded where Adam is torch's own.
- ``checkpoint_index``: a checkpoint read in one process, without Megatron.
"""
