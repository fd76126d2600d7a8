"""`FastLanguageModel`: from a name to a model with adapters, and back to files.

The one module that knows every other: it picks the converter for a folder, and hands the parts to each other.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlora import fp8, lora, offload, remat, sharding
from jaxlora.config import LoraConfig, ModelConfig
from jaxlora.converters import peft
from jaxlora.converters.bitsandbytes import BitsandbytesSource
from jaxlora.converters.checkpoint import open_checkpoint, open_tokenizer
from jaxlora.converters.families import FAMILIES
from jaxlora.converters.huggingface import CheckpointError, load_model, model_config
from jaxlora.converters.scaled import ScaledSource
from jaxlora.engine import Engine
from jaxlora.hub import resolve_path
from jaxlora.language_model import LanguageModel
from jaxlora.lora_targets import copied, target_ranks
from jaxlora.model import CausalLM
from jaxlora.modes import choose_mode, resolve_dtype
from jaxlora.vocabulary import learning_rows, repair_tokenizer, resize_vocabulary

logger = logging.getLogger(__name__)

# The options of LoraConfig that come down to a rank and a scaling for each module.
_PER_MODULE = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)


class FastLanguageModel:
    """The door, with Unsloth's names: `from_pretrained`, then `get_peft_model`."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        load_in_fp8: bool | Literal["block"] = False,
        full_finetuning: bool = False,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        rope_scaling: dict | None = None,
        float32_mixed_precision: bool | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        unsloth_tiled_mlp: bool = False,
        matmul_dtype: str | None = None,
        offload_embedding: bool = False,
        device_map: str | object | None = "sequential",
        quantization_config: dict | object | None = None,
        trust_remote_code: bool = False,
        text_only: bool = False,
        use_exact_model_name: bool = False,
        fix_tokenizer: bool = True,
        resize_model_vocab: int | None = None,
        random_state: int = 3407,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        base_model_name_or_path: str | Path | None = None,
        **unknown: Any,
    ) -> tuple[LanguageModel, Any]:
        """Load a model and its tokenizer.

        Args:
            model_name: a folder with config.json and safetensors, a .gguf file, a folder of PEFT adapter files (the
                base is loaded from its `base_model_name_or_path`, the adapter attached and trainable), or a Hugging
                Face id.
            max_seq_length: tokens in a training row, by default 2048 or the native window if that is shorter. Beyond
                the native window it needs `rope_scaling`, or a model whose own rope scaling is llama3, which only
                widens.
            dtype: compute dtype and dtype of the weights that are not quantised, as a jnp or torch dtype or its name.
                None is bfloat16 on a GPU that has it, float16 on one that has not, and float32 on the CPU.
            load_in_4bit: NF4 with double quantisation; what happens unless another mode is asked for.
            load_in_8bit: int8 with a scale for each row, as in bitsandbytes' Linear8bitLt.
            load_in_16bit: no quantisation.
            load_in_fp8: float8 (e4m3): True with a scale for each row, "block" for each block of 128 x 128.
            full_finetuning: every weight learns, and none is quantised; `get_peft_model` then has no effect.
            token: for a private or gated Hugging Face repository, by default the one that `hf auth login` stored; False
                sends none.
            revision: branch, tag or commit of the Hugging Face repository.
            cache_dir: where downloads lie, by default Hugging Face's cache.
            local_files_only: never ask the network.
            rope_scaling: replaces the checkpoint's rope scaling, in the form of config.json: {"rope_type": ..., ...}.
            float32_mixed_precision: with full_finetuning, True keeps the weights and the optimizer state in float32
                while the model computes in `dtype`. None and False keep them in `dtype`, half the memory at a somewhat
                higher loss; but float16 weights cannot be trained, and are float32 all the same.
            use_gradient_checkpointing: what a layer keeps for its backward pass: False or "none", "projections",
                "attention", True or "full", "unsloth" or "offload", "offload_attention", "offload_residual"; see
                `remat`. "auto" is the fastest of these that fits the device, decided at the first step.
            unsloth_tiled_mlp: cut the MLP into tiles of tokens under every policy of gradient checkpointing; those that
                keep little do so anyway.
            matmul_dtype: "fp8" multiplies in float8 in the linear layers of the blocks, for batches of many tokens: the
                frozen weights and the activations are rounded to e4m3 on the way (`fp8`). A GPU must be of compute
                capability 8.9 or later. None multiplies in `dtype`.
            offload_embedding: keep the input embedding in pinned host memory. The host looks rows up, and only they
                travel; the inputs of layers, too, where a model has such (Gemma 4). Warns and does nothing where the
                embedding is also the head, and there are no such inputs.
            device_map: a mesh of `sharding.make_mesh`, or its sizes as a text, "data=2,fsdp=4": its devices get their
                shards of each tensor as it is read, and training goes over it; or None, "auto" or "sequential", which
                are all the first device.
            quantization_config: another way to ask for a mode: a `QuantConfig`, or one of transformers (bitsandbytes
                4-bit of type "nf4" or 8-bit, fine-grained fp8, fbgemm fp8), as an object or a dict. The
                `bnb_4bit_compute_dtype` in it is what `dtype=None` then means.
            trust_remote_code: no code of a checkpoint is ever run; True warns that this is so.
            text_only: say that of a model with a vision tower only the language model is wanted, which is what is
                loaded in any case; without it there is a warning.
            qat_scheme: with full_finetuning, compute as a quantised model will; see `get_peft_model`.
            use_exact_model_name: both values are the same, since no name is mapped to another.
            fix_tokenizer: repair the pad token, the padding side and the generation prompt of the tokenizer; see
                `vocabulary.repair_tokenizer`.
            resize_model_vocab: number of rows of the embedding and the head, if larger than the checkpoint's; see
                `vocabulary.resize_vocabulary`.
            random_state: seed of the rows that `resize_model_vocab` adds, and of the requests of
                `fast_generate` that have none. Nothing else is drawn while loading.
            fast_inference: make `model.fast_generate` ready, which continues many prompts at once; see `engine`.
            gpu_memory_utilization: with fast_inference: share of the device's memory for weights and KV cache together.
            float8_kv_cache: with fast_inference: keep the KV cache in float8 (e4m3), half the memory of a 16-bit one.
            max_lora_rank: with fast_inference: the largest rank of an adapter.
            disable_log_stats: with fast_inference: False logs each call's tokens per second.
            base_model_name_or_path: for an adapter, the base to load in place of the one that it names: a folder, a
                .gguf file or an id. An adapter that was trained on a 4-bit repository names that one.

        Returns:
            (model, tokenizer). The tokenizer is None, with a warning, if the checkpoint has none.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: the files cannot be had; see `hub.resolve_path`.
            CheckpointError: they cannot be read as a supported model.
            TypeError: an argument that there is none of.
            ValueError: two modes at once, an unknown dtype, a window that the rope does not reach, or no room for a KV
                cache of one sequence.
        """
        _refuse_unknown(unknown)
        del use_exact_model_name  # no name is mapped to another, so every name is exact
        mode = choose_mode(
            load_in_4bit=load_in_4bit,
            quantization_config=quantization_config,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            load_in_fp8=load_in_fp8,
            full_finetuning=full_finetuning,
        )
        if float32_mixed_precision is not None and not full_finetuning:
            raise ValueError("float32_mixed_precision is for full_finetuning=True: adapters are float32 always")
        compute_dtype = resolve_dtype(mode.compute_dtype if dtype is None else dtype)
        if qat_scheme is not None and not full_finetuning:
            raise ValueError("qat_scheme is for full_finetuning=True here: with adapters it goes to get_peft_model")
        is_master = full_finetuning and (bool(float32_mixed_precision) or compute_dtype == jnp.float16)
        if float32_mixed_precision is False and is_master:
            raise ValueError(
                "float32_mixed_precision=False with float16: the updates of float16 weights would be lost. Leave it "
                "out for float32 weights, or pass dtype='bfloat16'"
            )
        policy = remat.resolve(use_gradient_checkpointing)
        if matmul_dtype is not None:
            fp8.check(matmul_dtype, full_finetuning)
        hub: dict[str, Any] = dict(
            token=token, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        )
        path = resolve_path(model_name, **hub)
        adapter = None
        if (path / "adapter_config.json").exists():
            if full_finetuning:
                raise ValueError(
                    f"{path} is an adapter, and full_finetuning=True trains no adapters: merge it with "
                    "save_pretrained_merged and load the result"
                )
            adapter = path
            if base_model_name_or_path is not None:
                model_name, revision = base_model_name_or_path, None
            else:
                model_name, revision = peft.base_model_name(path), peft.base_model_revision(path)
            path = _resolve_base(adapter, model_name, {**hub, "revision": revision})
        elif base_model_name_or_path is not None:
            raise ValueError(f"base_model_name_or_path is for adapters, and {path} is none")

        checkpoint = open_checkpoint(path)
        source, hf_config, tokenizer = checkpoint.source, checkpoint.hf_config, checkpoint.tokenizer
        if rope_scaling is not None:
            hf_config = _with_rope_scaling(hf_config, rope_scaling)
        _say_what_is_not_loaded(path, hf_config, trust_remote_code=trust_remote_code, text_only=text_only)
        config = model_config(hf_config, source.names())
        place = _placer(config, device_map, offload_embedding, full_finetuning)
        window = _check_window(config, max_seq_length)
        quant_config = mode.quant_config
        if isinstance(source, BitsandbytesSource | ScaledSource):
            stored = source.quant_config()
            if not mode.agrees(stored):
                raise ValueError(_other_mode(path, stored.scheme, mode.asked, model_name if adapter else None))
            quant_config = stored
        model = load_model(
            source,
            hf_config,
            dtype=jnp.float32 if is_master else compute_dtype,
            quant_config=quant_config,
            config=config,
            place=place,
            cls=LanguageModel,
        )
        if matmul_dtype is not None:
            lora.multiply_in(model, matmul_dtype)
        model.dtype = compute_dtype  # every layer casts its weights to what it is given
        if full_finetuning:
            lora.unfreeze(model)
            model.full_finetuning = True
            if qat_scheme is not None:
                lora.prepare_qat(model, qat_scheme)
        if resize_model_vocab is not None:
            resize_vocabulary(model, resize_model_vocab, jax.random.key(random_state))
        # Absolute where it is a path: an adapter that names it may be loaded from anywhere.
        model.base_folder = str(path.resolve())
        model.name_or_path = model.base_folder if Path(model_name).expanduser().exists() else str(model_name)
        model.revision = revision
        model._generation_config = json.dumps(checkpoint.generation_config)
        model.max_seq_length, model.remat_policy, model.tiled_mlp = window, policy, unsloth_tiled_mlp
        if adapter is not None:
            resize_vocabulary(model, peft.vocabulary_rows(model, adapter), jax.random.key(random_state))
            model.lora_config = peft.load_adapter(model, adapter)
            tokenizer = open_tokenizer(adapter) or tokenizer
        if tokenizer is None:
            warnings.warn(f"{path} has no tokenizer files: the tokenizer is None", stacklevel=2)
        elif fix_tokenizer:
            repair_tokenizer(tokenizer, hf_config, model.config.vocab_size)
        if fast_inference:
            model.engine = Engine(
                tokenizer,
                gpu_memory_utilization=gpu_memory_utilization,
                cache_dtype=jnp.float8_e4m3fn if float8_kv_cache else None,
                max_lora_rank=max_lora_rank,
                disable_log_stats=disable_log_stats,
                seed=random_state,
            )
            model.engine.cache_bytes(model)  # says now if there is no room
        elif (gpu_memory_utilization, float8_kv_cache, max_lora_rank, disable_log_stats) != (0.5, False, 64, True):
            warnings.warn(
                "gpu_memory_utilization, float8_kv_cache, max_lora_rank and disable_log_stats do nothing without "
                "fast_inference=True",
                stacklevel=2,
            )
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: Sequence[str] | str = (
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ),
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        layers_to_transform: Sequence[int | str] | int | None = None,
        layers_pattern: Sequence[str] | str | None = None,
        init_lora_weights: bool | str = True,
        *,
        exclude_modules: Sequence[str] | str | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        bias: str = "none",
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        loftq_config: dict[str, int] | None = None,
        ensure_weight_tying: bool = False,
        target_parameters: Sequence[str] | None = None,
        finetune_last_n_layers: int | None = None,
        qat_scheme: str | None = None,
        max_seq_length: int | None = None,
        temporary_location: str | None = None,
        init_dataset: Any = None,
        eva_config: Any = None,
        corda_config: Any = None,
    ) -> LanguageModel:  # fmt: skip
        """Put LoRA adapters on the model, in place, and return it. What is not an adapter stays frozen.

        Args:
            model: what `from_pretrained` returned.
            r: rank of the adapters.
            target_modules: names of the linear layers that get one (a path, or its end from a dot on), or
                "all-linear", or any other text as a regular expression for whole paths.
            lora_alpha: the update is scaled by lora_alpha / r.
            lora_dropout: share of an adapter's inputs that are zeroed while training.
            use_gradient_checkpointing: what a layer keeps for its backward pass: False or "none", "projections",
                "attention", True or "full", "unsloth" or "offload", "offload_attention", "offload_residual"; see
                `remat`. "auto" is the fastest of these that fits the device, decided at the first step.
            random_state: seed of the adapters' initial values.
            use_rslora: scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA).
            layers_to_transform: indices of the layers that get adapters, by default all.
            layers_pattern: names of the lists of layers whose numbers those indices are, by default any list.
            init_lora_weights: where the adapters start: True, False, "gaussian" or "orthogonal"; or "pissa",
                "pissa_niter_<number>" or "olora", which take their start out of the base weights; or "loftq", which
                quantises an unquantised base so that the adapters make up for what is lost; or, with `init_dataset`,
                "eva", which gives ranks to the layers whose inputs vary in most directions and starts from these, or
                "corda", which takes out of the base weights what the data needs most or least.
            exclude_modules: names, or a regular expression for whole paths, of linear layers that get none.
            rank_pattern: ranks of single modules, {regular expression for the end of a path: rank}.
            alpha_pattern: the same for lora_alpha.
            bias: which biases of the checkpoint learn too: "none", "lora_only" (those of adapted modules) or "all".
            use_dora: give each output a magnitude that learns (DoRA).
            modules_to_save: modules whose weights learn as a whole, such as ["embed_tokens", "lm_head"], by the end of
                their paths. They are saved with the adapter, and are float32.
            loftq_config: for "loftq": {"loftq_bits": 4 or 8, "loftq_iter": rounds}, by default 4 and 1.
            ensure_weight_tying: a head that is tied to the embedding stays so, and follows what the embedding learns.
                Without it only what is named learns, and a merged checkpoint has a head of its own.
            target_parameters: parameters of experts of which each expert gets an adapter, as transformers names them:
                "mlp.experts.gate_up_proj" and "mlp.experts.down_proj", or the ends or whole of their paths. The names
                gate_proj, up_proj and down_proj in `target_modules` may then match nothing.
            finetune_last_n_layers: the same as `layers_to_transform` with the last layers.
            qat_scheme: compute as a quantised model will: "int8", "int4", "fp8-fp8" or "fp8-int4"; see
                `kernels.fake_quant`. Exported in 16 bit and quantised so, the model computes what was trained.
            max_seq_length: said to `from_pretrained`; another number here warns that it changes nothing.
            temporary_location: warns that it changes nothing, since embeddings that learn stay in memory.
            init_dataset: what "eva" and "corda" start from: batches to run the model over, dicts of arrays [B, T] with
                input_ids and perhaps labels, attention_mask or segment_ids (0 is padding, which is not looked at), and
                positions. "eva" goes through them until its directions settle, "corda" reads all.
            eva_config: for "eva": rho, tau, use_label_mask, label_mask_value, whiten, adjust_scaling_factors; see
                `EvaConfig`.
            corda_config: for "corda": corda_method "ipm" or "kpm", covariance_file; see `CordaConfig`.

        Raises:
            TypeError: `r` is not an integer, or the model has adapters with other settings.
            ValueError: a rank below 1, or a target that matches nothing (the message lists the names that exist).
        """
        if model.full_finetuning:
            warnings.warn("full fine-tuning is on, so get_peft_model has no effect", stacklevel=2)
            return model
        if max_seq_length is not None and max_seq_length != model.max_seq_length:
            warnings.warn(
                f"max_seq_length={max_seq_length} changes nothing here: from_pretrained made it {model.max_seq_length}",
                stacklevel=2,
            )
        if temporary_location is not None:
            warnings.warn("temporary_location changes nothing: embeddings that learn stay in memory", stacklevel=2)
        targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
        layers = layers_to_transform
        if finetune_last_n_layers is not None:
            layers = _last_layers(model, finetune_last_n_layers, layers)
        if isinstance(layers, Sequence):
            layers = tuple(int(layer) for layer in layers)  # the command line gives texts
        config = LoraConfig(
            r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora, target_modules=targets,
            exclude_modules=exclude_modules, layers_to_transform=layers, layers_pattern=layers_pattern,
            rank_pattern=rank_pattern or (), alpha_pattern=alpha_pattern or (), init_lora_weights=init_lora_weights,
            loftq_config=loftq_config or (), use_dora=use_dora, bias=bias, modules_to_save=modules_to_save,
            ensure_weight_tying=ensure_weight_tying, eva_config=eva_config, corda_config=corda_config,
            target_parameters=target_parameters,
        )  # fmt: skip
        config = learning_rows(model, config)
        policy = remat.resolve(use_gradient_checkpointing)
        if model.lora_config is not None:
            if not _same_adapters(model, model.lora_config, config):
                raise TypeError(
                    f"the model already has LoRA adapters with other settings: it has {model.lora_config}, asked for "
                    f"is {config}. Load the base model anew"
                )
            warnings.warn("the model already has these LoRA adapters: nothing was changed", stacklevel=2)
            return model
        _check_offloaded(model, config)
        if qat_scheme is not None:
            lora.prepare_qat(model, qat_scheme, lora_dropout)
        model.lora_config = lora.add_adapters(model, config, jax.random.key(random_state), init_dataset)
        model.remat_policy = policy
        return model

    @staticmethod
    def for_inference(model: LanguageModel) -> LanguageModel:
        """The model as it is: nothing has to be switched before it generates.

        What differs while training is said to each call: dropout is on where a key is given, as the trainer does,
        and gradient checkpointing is there only where a gradient is taken.
        """
        return model

    @staticmethod
    def for_training(model: LanguageModel, use_gradient_checkpointing: bool | str | None = None) -> LanguageModel:
        """The model as it is, see `for_inference`.

        Args:
            use_gradient_checkpointing: what a layer keeps for its backward pass from now on, as in `get_peft_model`;
                None leaves it.

        Raises:
            ValueError: no such policy.
        """
        if use_gradient_checkpointing is not None:
            model.remat_policy = remat.resolve(use_gradient_checkpointing)
        return model


def _last_layers(model: CausalLM, count: int, given: Any) -> tuple[int, ...]:
    depth = model.config.num_hidden_layers
    if given is not None:
        raise ValueError(
            f"layers_to_transform={given!r} and finetune_last_n_layers={count} both name layers: choose one"
        )
    if not 0 < count <= depth:
        raise ValueError(f"finetune_last_n_layers must be from 1 to the model's {depth} layers, found {count}")
    return tuple(range(depth - count, depth))


def _same_adapters(model: CausalLM, ours: LoraConfig, theirs: LoraConfig) -> bool:
    """Whether both give the same modules the same adapters, in whatever words, and agree in all else."""

    def adapters(config):
        modules = {}
        for linear, ranks in target_ranks(model, config):
            named = zip(linear.names(), ranks, strict=True)
            modules |= {name: (rank, config.scaling_of(name)) for name, rank in named if rank}
        return modules

    alike = dataclasses.replace(theirs, **{name: getattr(ours, name) for name in _PER_MODULE})
    if ours.init_lora_weights == "eva":  # whose data moved ranks between the modules, and left the sum
        here, asked = adapters(ours), adapters(theirs)
        total = [sum(rank for rank, _ in found.values()) for found in (here, asked)]
        return ours == alike and here.keys() <= asked.keys() and total[0] == total[1]
    return ours == alike and adapters(ours) == adapters(theirs)


def _check_offloaded(model: LanguageModel, config: LoraConfig) -> None:
    """Refuse to train, or to take norms of, an embedding that is in host memory."""
    tables = [
        table
        for table in (model.model.embed_tokens, model.model.embed_tokens_per_layer)
        if table is not None and jax.typeof(table.weight.get_value()).memory_space == jax.memory.Space.Host
    ]
    if not tables:
        return
    learns = any(copy.module.node in tables for copy in copied(model, config))
    if learns or (config.use_dora and any(target.node in tables for target, _ in target_ranks(model, config))):
        raise ValueError(
            "the embedding is in host memory, and only rows of it reach the device, but modules_to_save, new tokens or "
            "use_dora need all of it there: load the model without offload_embedding"
        )


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    if unknown:
        parameters = inspect.signature(FastLanguageModel.from_pretrained).parameters.values()
        known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        raise TypeError(
            f"from_pretrained has no argument {', '.join(map(repr, unknown))}, and passes nothing on to transformers. "
            f"It has {', '.join(known)}"
        )


def _resolve_base(adapter: Path, name: str | Path, hub: dict[str, Any]) -> Path:
    try:
        return resolve_path(name, **hub)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of the adapter {adapter} cannot be had: {error}. Pass base_model_name_or_path=... to load "
            "it onto another, a folder say"
        ) from error


def _other_mode(path: Path, scheme: str, asked: str, base: str | Path | None) -> str:
    """Why a checkpoint of quantised weights is not loaded in another mode. base: the name of it, for an adapter's."""
    if base is None:
        return f"{path} holds weights quantised as {scheme}: load it without {asked}, or load the 16-bit model"
    original = re.sub(r"(-unsloth)?-bnb-4bit$", "", str(base))
    hint = f"base_model_name_or_path={original!r}" if original != str(base) else "base_model_name_or_path=..."
    return (
        f"the adapter's base {base} holds weights quantised as {scheme}: load it without {asked}, or pass the 16-bit "
        f"model that it was made of, {hint}"
    )


def _say_what_is_not_loaded(path: Path, hf_config: dict, *, trust_remote_code: bool, text_only: bool) -> None:
    """Refuse a model that is code of its own, and warn of parts that are left alone."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES and "auto_map" in hf_config:
        raise CheckpointError(
            f"{path / 'config.json'}: model_type {model_type!r} is code of its own (auto_map), which is never run "
            f"here, whatever trust_remote_code says. Supported are {', '.join(sorted(FAMILIES))}; "
            "docs/adding-a-family.md says how one is added"
        )
    if trust_remote_code:
        warnings.warn("trust_remote_code=True has no effect: no code of a checkpoint is ever run", stacklevel=3)
    if "vision_config" in hf_config and not text_only:
        warnings.warn(
            f"{path}: its vision tower is not loaded, only its language model; text_only=True says that this is meant",
            stacklevel=3,
        )


def _placer(config: ModelConfig, device_map: Any, offload_embedding: bool, full_finetuning: bool) -> Any:
    """Where `load_model` puts the weights: a function, or None for the first device."""
    if isinstance(device_map, str) and "=" in device_map:
        device_map = sharding.parse_mesh(device_map)
    if isinstance(device_map, Mesh):
        if offload_embedding:
            raise ValueError(
                "offload_embedding=True is for one device, and device_map is a mesh, which splits the table"
            )
        return sharding.placer(device_map)
    if device_map not in (None, "auto", "sequential"):
        raise ValueError(
            f"device_map {device_map!r} is not a mesh, None, 'auto' or 'sequential' (the last three are the first "
            "device). Layers are not dealt out to devices, where all but one would wait: with a mesh each device holds "
            "a part of every layer. Pass device_map=jaxlora.sharding.make_mesh(fsdp=4), say"
        )
    if not offload_embedding:
        return None
    if full_finetuning:
        raise ValueError("offload_embedding=True keeps the embedding frozen, and full_finetuning=True trains it")
    tables = ["embed_tokens"] * (not config.tie_word_embeddings)
    tables += ["embed_tokens_per_layer"] * bool(config.hidden_size_per_layer_input)
    if not tables:
        warnings.warn(
            "offload_embedding=True has no effect: the embedding is also the head of this model, whose every step "
            "needs the whole of it",
            stacklevel=3,
        )
        return None
    ends = tuple(f".{dict(config.tensor_names).get(table, table)}.weight" for table in tables)
    return lambda parameter, value: offload.pinned_host() if parameter.name.endswith(ends) else None


def _with_rope_scaling(hf_config: dict, rope_scaling: dict) -> dict:
    """config.json with another scaling of rope; its base, and the part of a head that turns, stay what they are. The
    window becomes what the scaling says, where that names the original window, as such config.json files have it."""
    if "text_config" in hf_config:
        text = {"model_type": f"{hf_config['model_type']}_text", **hf_config["text_config"]}
        return {**hf_config, "text_config": _with_rope_scaling(text, rope_scaling)}
    now, before = model_config(hf_config).rope, hf_config.get("rope_parameters") or {}
    if now.rope_type == "proportional":  # whose pairs are others than those of a part of a head
        if rope_scaling.get("rope_type", rope_scaling.get("type")) not in ("linear", "proportional"):
            raise ValueError(
                f"rope_scaling={rope_scaling!r}: this model's rope_type is 'proportional', which only takes a factor: "
                'pass {"rope_type": "proportional", "factor": 2.0}, say'
            )
        rope_scaling = {**{k: v for k, v in rope_scaling.items() if k != "type"}, "rope_type": "proportional"}
    rope = {"rope_theta": now.rope_theta, "partial_rotary_factor": now.partial_rotary_factor, **rope_scaling}
    rope |= {k: v for k, v in before.items() if k.startswith("mrope_")}
    if "full_attention" in before:  # sliding layers have one of their own, which is not scaled
        rope = {**before, "full_attention": rope}
    rest = {k: v for k, v in hf_config.items() if k not in ("rope_scaling", "rope_parameters")}
    scaled = {**rest, "rope_theta": now.rope_theta, "rope_parameters": rope}
    new = model_config(scaled)
    if rope_scaling.get("original_max_position_embeddings") and rope_scaling.get("factor"):
        scaled["max_position_embeddings"] = _reach(new)
    return scaled


def _reach(config: ModelConfig) -> int:
    """The window that the rope scaling makes of the native one."""
    native, rope = config.max_position_embeddings, config.rope
    original = rope.original_max_position_embeddings
    if rope.rope_type in ("yarn", "longrope") and original is not None:
        return max(native, int(original * rope.factor))
    scaled = rope.rope_type in ("linear", "proportional", "dynamic", "yarn") and original is None
    return int(native * rope.factor) if scaled else native


def _check_window(config: ModelConfig, max_seq_length: int | None) -> int:
    native, reach = config.max_position_embeddings, _reach(config)
    if max_seq_length is None:
        return min(2048, native)
    if max_seq_length < 1:
        raise ValueError(f"max_seq_length must be at least 1, found {max_seq_length}")
    if max_seq_length > reach and config.rope.rope_type != "llama3":
        raise ValueError(
            f"max_seq_length={max_seq_length} is beyond the model's window of {reach} tokens. Pass for example "
            f'rope_scaling={{"rope_type": "yarn", "factor": {max_seq_length / native:.1f}, '
            f'"original_max_position_embeddings": {native}}}, or a shorter max_seq_length'
        )
    return max_seq_length
