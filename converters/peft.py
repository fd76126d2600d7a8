"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

A module's tensors are "base_model.model." + its checkpoint name + ".lora_A.weight" [r, in] and ".lora_B.weight"
[out, r], of an embedding ".lora_embedding_A" and ".lora_embedding_B", with DoRA ".lora_magnitude_vector" [out];
copies that learn have the checkpoint's own names. All are float32. What PEFT can say in adapter_config.json and this
library cannot do is refused when it is read. `peft_experts` says how experts differ.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxlora import lora
from jaxlora.config import LoraConfig
from jaxlora.converters import peft_experts
from jaxlora.converters.families import FAMILIES
from jaxlora.converters.huggingface import CheckpointError, SafetensorsFile, tensor_problems
from jaxlora.converters.staging import staged
from jaxlora.layers import Embedding
from jaxlora.lora_targets import Copied, copied, is_target_parameter, target_ranks
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.variables import Adapted, Weighted
from jaxlora.vocabulary import learning_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What PEFT has written since 0.11, at the values of a plain LoRA. Older versions refuse the fields that came later, and
# newer ones take what is missing for just these values.
_PLAIN: Mapping[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "task_type": "CAUSAL_LM",
    "use_dora": False,
}

# Fields that are read here, and fields that say nothing about what a trained adapter computes.
_OPTIONS = (
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "loftq_config",
    "use_dora",
    "bias",
    "modules_to_save",
    "ensure_weight_tying",
    "target_parameters",
)
_READ = {"peft_type", "r", "lora_alpha", "init_lora_weights", *_OPTIONS}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations that leave the base alone, and that say nothing about a trained adapter.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Those that change it, and that can be done again: what pissa_niter_n took out of the base was drawn at random.
_FROM_BASE = ("pissa", "olora", "loftq")

_CARD = """\
---
{metadata}---

# LoRA adapter

A LoRA adapter (rank {r}, alpha {alpha}) of `{base}`, trained with jaxlora. Its targets are {targets}.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")
```
"""


# ---- Saving ----------------------------------------------------------------------------------------------------------


def save_adapter(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    config: LoraConfig,
    base: str,
    revision: str | None = None,
) -> None:
    """Write the model's adapters as a folder that PEFT loads, with the tokenizer's files if one is given.

    An adapter whose start was taken out of the base (`init_lora_weights` "pissa", "olora" or "corda") is written as a
    plain one of twice the rank for the base as it was, B A - B_0 A_0: PEFT's
    `path_initial_model_for_weight_conversion`.

    Args:
        model: a model with adapters.
        folder: is made if it is not there. Files of the same names are replaced, all or none.
        tokenizer: one of transformers, or None.
        config: the adapters' settings.
        base: what PEFT is to load the base model from: an id of the hub, or a folder.
        revision: of the base model on the hub.

    Raises:
        ValueError: the model has no adapters, or others than `config` says.
        OSError: the folder cannot be written to.
    """
    config = config.on_plain_base()
    _check_adapters(model, config)
    targets, parameters = target_modules(model), list(config.target_parameters or ())
    family = FAMILIES[model.config.model_type]
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha
    options = {
        **_PLAIN,
        "base_model_name_or_path": base or None,
        "revision": revision,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _as_expression(model, targets) if family.adapted_by_path else targets,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_dora": config.use_dora,
        "bias": config.bias,
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
    }
    if config.ensure_weight_tying:  # which older versions of PEFT do not know
        options["ensure_weight_tying"] = True
    if parameters:  # so here
        options |= {"target_parameters": parameters, "peft_version": peft_experts.LAYOUT_VERSION}
    if config.changes_base:
        options["init_lora_weights"] = config.init_lora_weights
        options["loftq_config"] = {"loftq_bits": config.loftq_bits, "loftq_iter": config.loftq_iter}
    with staged(folder) as stage:
        save_file(adapter_tensors(model), stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True))
        (stage / "README.md").write_text(
            _model_card(config.r, alpha, base, [*targets, *(config.target_parameters or ())])
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)


def adapter_tensors(model: CausalLM) -> dict[str, np.ndarray]:
    """{PEFT's name: float32 tensor} of all adapters and copies, on the host, for the weights of the checkpoint."""
    tensors, adapted = {}, _adapted(model)
    for module in lora.adapters(model):
        for adapter in lora.layer_adapters(model, module):
            keys = _keys_of(adapter.name, module, adapted, use_dora=adapter.magnitude is not None)
            matrices = (adapter.a, adapter.b)
            matrices = peft_experts.pack(*matrices) if module.node.experts else matrices
            values = (*matrices, adapter.magnitude)
            tensors |= {key: np.ascontiguousarray(value) for key, value in zip(keys, values, strict=False)}
    for name, value in lora.trained_copies(model):
        tensors[_copy_key(name, adapted)] = np.ascontiguousarray(value)
    return tensors | _followers(model, tensors)


def _followers(model: CausalLM, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a tied head has from the embedding (`ensure_weight_tying`), which PEFT wants a second time."""
    if not model.ties_adapters:
        return {}
    head, table = _head_and_embedding(model)
    a, b = _keys(table, is_table=True, use_dora=False)
    if a in tensors:
        head_a, head_b = _keys(head, is_table=False, use_dora=False)
        return {head_a: np.ascontiguousarray(tensors[b].T), head_b: np.ascontiguousarray(tensors[a].T)}
    weights = [_copy_key(f"{name}.weight", set()) for name in (head, table)]
    return {weights[0]: tensors[weights[1]]} if weights[1] in tensors else {}


def _head_and_embedding(model: CausalLM) -> tuple[str, str]:
    """Their paths in the checkpoint."""
    paths = {id(module.node): module.name for module in named_nodes(model, Adapted)}
    return paths[id(model.lm_head)], paths[id(model.model.embed_tokens)]


def target_modules(model: CausalLM) -> list[str]:
    """What `target_modules` has to say so that PEFT adapts the modules that are adapted here, sorted.

    The last part of a module's path, or the whole path where another module with that last part has no adapter.
    """
    names, adapted = {name for module in named_nodes(model, Weighted) for name in module.names()}, _adapted(model)
    adapted = adapted & names  # without parameters of experts
    plain = {_last(name) for name in names - adapted}
    return sorted({name if _last(name) in plain else _last(name) for name in adapted})


def _as_expression(model: CausalLM, targets: Sequence[str]) -> str:
    """`target_modules` as an expression for whole paths, of modules of the decoder only."""
    decoder, adapted = dict(model.config.tensor_names)["model"], _adapted(model)
    inside = sorted({_last(name) for name in adapted if name.startswith(f"{decoder}.")} & set(targets))
    alone = [re.escape(target) for target in targets if target not in inside]
    return "|".join([rf"{re.escape(decoder)}\.(.*\.)?({'|'.join(inside)})"] * bool(inside) + alone)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _keys(module: str, *, is_table: bool, use_dora: bool) -> list[str]:
    """The names of A, B and, with DoRA, the magnitudes."""
    parts = ["lora_embedding_A", "lora_embedding_B"] if is_table else ["lora_A.weight", "lora_B.weight"]
    return [f"base_model.model.{module}.{part}" for part in (*parts, *(["lora_magnitude_vector"] * use_dora))]


def _keys_of(name: str, target: Named, adapted: set[str], *, use_dora: bool) -> list[str]:
    """The names of what an adapter of a target has; `adapted` are the paths of all that carry one."""
    name = peft_experts.wrapper_name(name, adapted) if target.node.experts else name
    return _keys(name, is_table=isinstance(target.node, Embedding), use_dora=use_dora)


def _copy_key(name: str, adapted: set[str]) -> str:
    """The name of a copy: an adapted module is a wrapper around the checkpoint's."""
    module, part = name.rsplit(".", 1)
    return f"base_model.model.{module}.{'base_layer.' * (module in adapted)}{part}"


def _adapted(model: CausalLM) -> set[str]:
    """The paths of all modules, and parameters of experts, that carry an adapter."""
    return {
        name
        for module in lora.adapters(model)
        for name, rank in zip(module.names(), module.node.lora_ranks, strict=True)
        if rank
    }


def _check_adapters(model: CausalLM, config: LoraConfig) -> None:
    adapters = lora.adapters(model)
    if not adapters:
        raise ValueError("the model has no adapter to save: call FastLanguageModel.get_peft_model first")
    for module in adapters:
        for adapter in lora.layer_adapters(model, module):
            if module.node.experts and not is_target_parameter(config, adapter.name):
                raise ValueError(
                    f"{adapter.name} has adapters, and the settings say target_parameters={config.target_parameters}: "
                    "pass the LoraConfig that the adapters were made with"
                )
            rank, scaling = config.rank_of(adapter.name), config.scaling_of(adapter.name)
            if adapter.rank != rank or not np.allclose(adapter.scaling, scaling):
                raise ValueError(
                    f"{adapter.name}: its adapter has rank {adapter.rank} and scaling {adapter.scaling}, but the "
                    f"settings say rank {rank} and scaling {scaling}: pass the LoraConfig that the adapters were made "
                    "with"
                )


def _model_card(rank: int, alpha: float, base: str, targets: list[str]) -> str:
    metadata = f"base_model: {base}\n" if base and not Path(base).exists() else ""  # the hub takes ids only
    metadata += "library_name: peft\npipeline_tag: text-generation\ntags:\n- jaxlora\n- lora\n"
    names = ", ".join(f"`{target}`" for target in targets)
    return _CARD.format(metadata=metadata, r=rank, alpha=alpha, base=base or "an unnamed model", targets=names)


# ---- Loading ---------------------------------------------------------------------------------------------------------


def base_model_name(folder: str | Path) -> str:
    """What the adapter's base model is loaded from: an id of the hub or a path.

    An adapter may have its base beside it, in the folder "base". It is found there also after the whole has moved.

    Raises:
        CheckpointError: the adapter names no base.
    """
    folder = Path(folder)
    name = read_options(folder).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path is {name!r}: write the name or the folder of the base model "
            "there"
        )
    beside = folder / "base"
    if Path(name).name == "base" and not Path(name).exists() and (beside / "config.json").exists():
        return str(beside)
    return str(name)


def base_model_revision(folder: str | Path) -> str | None:
    """The revision of the base model on the hub that the adapter names, if any."""
    return read_options(folder).get("revision")


def vocabulary_rows(model: CausalLM, folder: str | Path) -> int:
    """The number of rows that the embedding needs for this adapter: as many as one that it brings along has."""
    return max(model.config.vocab_size, _table_rows(model, Path(folder)))


def _table_rows(model: CausalLM, folder: Path) -> int:
    """Rows of the embedding that the adapter brings along, 0 if it brings none."""
    _, table = _head_and_embedding(model)
    entry = _open_weights(model, folder).entries.get(_copy_key(f"{table}.weight", set()))
    return 0 if entry is None else entry.shape[0]


def read_options(folder: str | Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    path = Path(folder) / CONFIG
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); an adapter folder has one") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


def read_config(model: CausalLM, folder: str | Path) -> LoraConfig:
    """The settings of an adapter in a folder, if they fit the model.

    Raises:
        CheckpointError: see `load_adapter`.
    """
    return _read_config(model, read_options(folder), Path(folder) / CONFIG)[-1]


def load_adapter(model: CausalLM, folder: str | Path) -> LoraConfig:
    """Put an adapter, written by us or by PEFT, on a model, in place; it can be trained on. Returns its settings.

    Raises:
        ValueError: the model has adapters already.
        CheckpointError: the files are missing or broken, the adapter uses what is not supported (the message names all
            such options), or does not fit the model (it lists every missing, unexpected and misshapen tensor).
    """
    folder = Path(folder)
    if lora.adapters(model):
        raise ValueError(f"the model already has adapters, and cannot take those of {folder} too: load the base anew")
    options = read_options(folder)
    targets, copies, config = _read_config(model, options, folder / CONFIG)
    file = _open_weights(model, folder)

    adapted = {name for target, ranks in targets for name, rank in zip(target.names(), ranks, strict=True) if rank}
    keys_of = functools.partial(_keys_of, adapted=adapted, use_dora=config.use_dora)
    older = functools.partial(_is_older, file=file, keys_of=keys_of, version=options.get("peft_version"))
    shapes: dict[str, tuple[int, ...]] = {}
    for target, ranks in targets:
        node = target.node
        for name, rank in zip(target.names(), ranks, strict=True):
            if rank:
                sizes = [(rank, node.in_features), (node.out_features, rank), (node.out_features,)]
                sizes = peft_experts.sizes(node, rank, older=older(name, target)) if node.experts else sizes
                shapes |= dict(zip(keys_of(name, target), sizes, strict=False))
    for copy in copies:
        for key in _keys_of_copy(copy, adapted):
            shapes[key] = _shape_of(model, copy)
    ignored = _check_copies(model, [target for target, _ in targets], config, file)
    found = {name: entry.shape for name, entry in file.entries.items() if name not in ignored}
    problems = tensor_problems(shapes, found)
    if problems:
        raise CheckpointError(
            f"{file.path}: the tensors do not fit an adapter of rank {config.r} on {options.get('target_modules')} and "
            f"the parameters {options.get('target_parameters')} of this {model.config.model_type} model. {problems}"
        )

    for target, ranks in targets:

        def read(name: str, target: Named = target) -> Sequence[np.ndarray]:
            parts, experts = [file.read(key) for key in keys_of(name, target)], target.node.experts
            return peft_experts.unpack(*parts, *experts, older=older(name, target)) if experts else parts

        lora.attach_named(model, target, ranks, config, read)
    for copy in copies:
        lora.add_copy(model, copy.module, copy.part, copy.layers)
        variable = getattr(copy.module.node, f"trained_{copy.part}").value
        keys, value = iter(_keys_of_copy(copy, adapted)), np.array(variable.get_value())
        for i, learns in enumerate(copy.layers):
            if learns:
                value[i if copy.module.layers else ...] = file.read(next(keys))
        variable.set_value(jnp.asarray(value))
    lora.tie_adapters(model, config)
    return config


def _is_older(
    name: str, target: Named, *, file: SafetensorsFile, keys_of: Callable[..., list[str]], version: str | None
) -> bool:
    """Whether experts' A and B are in PEFT's layout before 0.19.1."""
    entry = file.entries.get(keys_of(name, target)[0])
    try:
        return peft_experts.is_older(target.node, None if entry is None else entry.shape, version)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path.parent / CONFIG}: {error}") from error


def _keys_of_copy(copy: Copied, adapted: set[str]) -> list[str]:
    named = zip(copy.module.names(), copy.layers, strict=True)
    return [_copy_key(f"{name}.{copy.part}", adapted) for name, learns in named if learns]


def _shape_of(model: CausalLM, copy: Copied) -> tuple[int, ...]:
    """The shape of one layer's weight or bias; a tied head's is the embedding's."""
    variable = getattr(copy.module.node, copy.part) or model.model.embed_tokens.weight
    shape = variable.get_value().shape
    return shape[1:] if copy.module.layers else shape


def _read_config(
    model: CausalLM, options: Mapping[str, Any], path: Path
) -> tuple[list[tuple[Named, tuple[int, ...]]], list[Copied], LoraConfig]:
    """The modules that adapter_config.json names with the ranks of their layers, what learns as a whole, and its
    settings as ours."""
    if options.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {options.get('peft_type')!r}; supported is 'LORA'")
    unsupported = {
        name: value
        for name, value in options.items()
        if name not in _READ | _WITHOUT_EFFECT and value != _PLAIN.get(name) and value not in (None, False, [], {})
    }
    if options.get("init_lora_weights") not in (*_INITIALISATIONS, *_FROM_BASE):
        unsupported["init_lora_weights"] = options["init_lora_weights"]
    if str(options.get("init_lora_weights")).startswith(("corda", "pissa_niter", "lora_ga")):
        raise CheckpointError(
            f"{path}: init_lora_weights={options['init_lora_weights']!r} is not supported in a file: what it took out "
            "of the base cannot be made again of the base alone. Save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it into its base and load the result"
        )
    if unsupported:
        found = ", ".join(f"{name}={value!r}" for name, value in sorted(unsupported.items()))
        raise CheckpointError(
            f"{path}: the adapter uses {found}, which is not supported: train it without, or merge it into its base "
            "with PEFT and load the result"
        )
    given = {name: options[name] for name in _OPTIONS if options.get(name) not in (None, [], {})}
    try:
        config = LoraConfig(
            r=options.get("r", 8),  # the defaults are PEFT's
            lora_alpha=options.get("lora_alpha", 8),
            init_lora_weights=options["init_lora_weights"] if options.get("init_lora_weights") in _FROM_BASE else True,
            **{"target_modules": (), **given},
        )
        if model.has_new_rows and _table_rows(model, path.parent):
            config = learning_rows(model, config)  # PEFT brings new rows along also where they do not learn
        targets, copies = target_ranks(model, config), list(copied(model, config))
        lora.check_start(config, targets)
        return targets, copies, config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_copies(model: CausalLM, targets: list[Named], config: LoraConfig, file: SafetensorsFile) -> set[str]:
    """The tensors that are copies of the base's weights, or of others in the file: PEFT writes those of embedding and
    head beside an adapter on either, and with `ensure_weight_tying` what the head follows a second time."""
    single = [module for module in named_nodes(model, Adapted) if not module.layers]
    bases = {f"base_model.model.{module.name}.base_layer.weight": module.node for module in single}
    copies = file.entries.keys() & bases.keys() if any(not target.layers for target in targets) else set()
    for name in copies:
        owner = bases[name] if bases[name].weight is not None else model.model.embed_tokens
        weight = np.asarray(owner.weight.get_value())
        if not np.array_equal(file.read(name).astype(weight.dtype), weight):
            raise CheckpointError(
                f"{file.path}: {name} is not the base model's: its vocabulary was changed or trained, which an adapter "
                "cannot bring along here: merge it into its base with PEFT and load the result"
            )
    if config.ensure_weight_tying and model.lm_head.weight is None:
        head, _ = _head_and_embedding(model)
        copies |= {name for name in file.entries if name.startswith(f"base_model.model.{head}.")}
    return copies


def _open_weights(model: CausalLM, folder: Path) -> SafetensorsFile:
    """The adapter's tensors, under the names of this model: a decoder that its checkpoint calls model.language_model is
    called model in an adapter that was made on the text alone."""
    path = folder / WEIGHTS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        why = "adapter_model.bin is a pickle, which can run code when read: " if pickled else ""
        raise CheckpointError(f"{path} is missing: {why}save the adapter again, with PEFT 0.5 or newer")
    file = SafetensorsFile(path)
    decoder = dict(model.config.tensor_names).get("model")
    if decoder == "model.language_model" and not any(".language_model." in name for name in file.entries):
        alone, whole = (f"base_model.model.{name}." for name in ("model", decoder))
        file.entries = {name.replace(alone, whole, 1): entry for name, entry in file.entries.items()}
    return file
