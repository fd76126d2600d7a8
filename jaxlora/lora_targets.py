"""Which modules a `LoraConfig` means: those that get an adapter, and those of whose weights a copy learns.

PEFT's rules, on paths of the checkpoint, and for parameters of experts on those of transformers; but what matches
nothing is an error, and what has no effect a warning.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence

from jaxlora.config import LoraConfig
from jaxlora.layers import Linear
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.moe import ExpertAdapter
from jaxlora.quant import QuantizedArray
from jaxlora.variables import Adapted, BaseParam, Weighted

# What target_modules may name without a linear, where experts are adapted as parameters: all families call them so.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def is_target(config: LoraConfig, module: str) -> bool:
    """Whether a config means the module of this path. "all-linear" is the caller's to spell out."""
    targets, excluded = config.target_modules, config.exclude_modules
    if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else _names(excluded, module)):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:  # a whole path, to which layers_to_transform has nothing to add
        return True
    return _names(targets, module) and _is_layer(config, module)


def is_target_parameter(config: LoraConfig, parameter: str) -> bool:
    """Whether a config means the parameter of experts of this path in transformers."""
    return _names(config.target_parameters or (), parameter)


def _names(targets: Sequence[str], module: str) -> bool:
    return any(module == target or module.endswith("." + target) for target in targets)


def _is_layer(config: LoraConfig, module: str) -> bool:
    indices, patterns = config.layers_to_transform, config.layers_pattern
    if indices is None:
        return True
    patterns = (patterns,) if isinstance(patterns, str) else patterns or (r"[^.]*",)
    found = next(filter(None, (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)), None)
    return found is not None and int(found[1]) in ((indices,) if isinstance(indices, int) else indices)


# ---- Adapters --------------------------------------------------------------------------------------------------------


def target_ranks(model: CausalLM, config: LoraConfig) -> list[tuple[Named, tuple[int, ...]]]:
    """The linears, embeddings and parameters of experts that get an adapter, each with the rank of every layer of its
    stack: 0 where a layer gets none.

    "all-linear" is every linear but the head. A module that is no stack has one rank. With
    `ensure_weight_tying` the adapter of a tied head is the embedding's.

    Raises:
        ValueError: a target, or all of them together, matches nothing (names every target that exists), or a layer
            that the model has not, or a tied adapter with DoRA, or a parameter that is not of experts.
    """
    modules = list(named_nodes(model, Adapted))
    _check_parameters(model, config)
    if config.target_modules == "all-linear":
        modules = [x for x in modules if isinstance(x.node, Linear) and x.node is not model.lm_head]
        blocks = tuple(sorted({module.name.rsplit(".", 1)[-1] for module in modules}))
        config = dataclasses.replace(config, target_modules=blocks)
    _check_targets(model, config)
    chosen = [
        (module, tuple(config.rank_of(name) if is_target(config, name) else 0 for name in module.names()))
        for module in modules
    ]
    chosen = [(module, ranks) for module, ranks in chosen if any(ranks)]
    parameters = _parameter_ranks(model, config)
    if not chosen and not parameters:
        raise ValueError(
            f"target_modules {config.target_modules!r} leaves no linear layer of this {model.config.model_type} model, "
            f"with exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and "
            f"layers_pattern={config.layers_pattern!r}"
        )
    return [*_tied(model, config, modules, chosen), *parameters]


def _parameter_ranks(model: CausalLM, config: LoraConfig) -> list[tuple[Named, tuple[int, ...]]]:
    parameters = [
        (parameter, tuple(config.rank_of(name) if is_target_parameter(config, name) else 0 for name in names))
        for parameter in named_nodes(model, ExpertAdapter)
        for names in [parameter.names()]
    ]
    return [(parameter, ranks) for parameter, ranks in parameters if any(ranks)]


def _check_parameters(model: CausalLM, config: LoraConfig) -> None:
    names = [name for parameter in named_nodes(model, ExpertAdapter) for name in parameter.names()]
    for target in config.target_parameters or ():
        if any(_names([target], name) for name in names):
            continue
        others = (name for parameter in named_nodes(model, BaseParam) for name in parameter.names())
        other = next((name for name in others if _names([target], name)), None)
        found = f"{other}, which is no parameter of experts" if other else "no parameter"
        known = ", ".join(sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})) or "none"
        raise ValueError(
            f"target_parameters: {target!r} matches {found}. Those of this {model.config.model_type} model, by the "
            f"names of transformers: {known}. A linear layer is named in target_modules"
        )


def _tied(model: CausalLM, config: LoraConfig, modules: list[Named], chosen: list) -> list:
    """With `ensure_weight_tying` and a tied target: the embedding's adapter, and none for the head."""
    embedding, head = model.model.embed_tokens, model.lm_head
    if not config.ensure_weight_tying or head.weight is not None:
        return chosen
    rest = [(module, ranks) for module, ranks in chosen if module.node is not embedding and module.node is not head]
    if len(rest) == len(chosen):
        return chosen
    if config.use_dora:
        raise ValueError(
            "ensure_weight_tying with use_dora: an embedding and a head have no magnitudes in common. Leave "
            "embed_tokens and lm_head out of target_modules, or one of the two options"
        )
    named = next(module for module in modules if module.node is embedding)
    return [*rest, (named, (config.rank_of(named.name),))]


def _check_targets(model: CausalLM, config: LoraConfig) -> None:
    modules = list(named_nodes(model, Adapted))
    names = [name for module in modules for name in module.names()]
    if isinstance(config.target_modules, str):
        pattern = config.target_modules
        matched = any(re.fullmatch(pattern, name) for name in names)
        unmatched, kind = ([] if matched else [pattern]), " as a regular expression for whole paths"
    else:
        of_experts = _OF_EXPERTS if config.target_parameters else ()
        unmatched, kind = [t for t in config.target_modules if not any(_names([t], name) for name in names)], ""
        unmatched = [target for target in unmatched if target not in of_experts]
    if unmatched:
        known = sorted({module.name.rsplit(".", 1)[-1] for module in modules})
        raise ValueError(
            f"target_modules: {', '.join(map(repr, unmatched))}{kind} matches no linear layer of this "
            f"{model.config.model_type} model. The names that exist: {', '.join(known)} (or 'all-linear')"
        )
    indices, depth = config.layers_to_transform, model.config.num_hidden_layers
    indices = (indices,) if isinstance(indices, int) else indices or ()
    if beyond := [index for index in indices if not 0 <= index < depth]:
        raise ValueError(f"layers_to_transform names {beyond}, but the model's layers are 0 to {depth - 1}")
    parameters = [name for target, _ in _parameter_ranks(model, config) for name in target.names()]
    _warn_of_idle_options(config, names, parameters, is_tied=model.lm_head.weight is None)


def _warn_of_idle_options(
    config: LoraConfig, names: Sequence[str], parameters: Sequence[str], *, is_tied: bool
) -> None:
    """Say what has no effect, as PEFT does for exclude_modules and ensure_weight_tying."""
    excluded = config.exclude_modules
    idle = [("exclude_modules", x) for x in ((excluded,) if isinstance(excluded, str) else excluded or ())]
    if isinstance(excluded, str):
        idle = [] if any(re.fullmatch(excluded, name) for name in names) else idle
    else:
        idle = [(option, x) for option, x in idle if not any(_names([x], name) for name in names)]
    for option in ("rank_pattern", "alpha_pattern"):
        for expression, _ in getattr(config, option):
            if not any(re.match(rf"(.*\.)?({expression})$", name) for name in (*names, *parameters)):
                idle.append((option, expression))
    for option, expression in idle:
        warnings.warn(f"{option}: {expression!r} matches no linear layer, and changes nothing", stacklevel=2)
    if parameters and config.layers_to_transform is not None:
        warnings.warn(
            "layers_to_transform does not act on target_parameters, as in PEFT: experts of all layers that their paths "
            "match get adapters. Name layers in the paths: 'layers.0.mlp.experts.down_proj', say",
            stacklevel=2,
        )
    if config.ensure_weight_tying and not is_tied:
        warnings.warn("ensure_weight_tying changes nothing: the model's head is not tied", stacklevel=2)


# ---- Copies ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
    """A weight or bias of which a copy learns. layers: of which layers of the stack; () of none.

    counts_base: whether PEFT holds the checkpoint's own beside the copy, and so counts both.
    """

    module: Named
    part: str
    layers: tuple[bool, ...]
    counts_base: tuple[bool, ...]


def copied(model: CausalLM, config: LoraConfig) -> Iterator[Copied]:
    """What learns as a whole: the weights and biases of `modules_to_save`, and the biases that `bias` says.

    Raises:
        ValueError: an entry of `modules_to_save` matches nothing (names what exists), or a module that has an adapter
            too, or a quantised weight.
    """
    modules, targets = list(named_nodes(model, Weighted)), target_ranks(model, config)
    adapted = {name for module, ranks in targets for name, rank in zip(module.names(), ranks, strict=True) if rank}
    keys = _tied_keys(model, config)
    _check_saved(model, modules, keys, adapted)
    _check_covered(model, config, keys, modules)
    for module in modules:
        saved = tuple(_is_saved(keys, name) for name in module.names())
        learns = tuple(
            is_saved or config.bias == "all" or (config.bias == "lora_only" and name in adapted)
            for is_saved, name in zip(saved, module.names(), strict=True)
        )
        if any(saved):
            yield Copied(module=module, part="weight", layers=saved, counts_base=saved)
        if any(learns) and module.node.bias is not None:
            yield Copied(module=module, part="bias", layers=learns, counts_base=saved)


def _check_covered(model: CausalLM, config: LoraConfig, keys: Sequence[str], modules: list[Named]) -> None:
    """Refuse what would have to learn and is held by no module that copies: biases of routers and experts, say."""
    covered = {f"{name}.{part}" for module in modules for name in module.names() for part in ("weight", "bias")}
    names = {name for parameter in named_nodes(model, BaseParam) for name in parameter.names()} - covered
    for option, value, wanted in (
        ("bias", config.bias, [name for name in names if config.bias == "all" and "bias" in name.rsplit(".", 1)[-1]]),
        ("modules_to_save", keys, [name for name in names if _is_saved(keys, name.rsplit(".", 1)[0])]),
    ):
        if wanted:
            raise ValueError(
                f"{option}={value!r} asks {', '.join(sorted(wanted)[:3])}{' …' if len(wanted) > 3 else ''} to learn, "
                "which cannot be trained beside adapters here: name other modules, or use full_finetuning=True"
            )


def _tied_keys(model: CausalLM, config: LoraConfig) -> tuple[str, ...]:
    """`modules_to_save`; with `ensure_weight_tying` the embedding in place of a tied head."""
    keys = tuple(config.modules_to_save or ())
    if not config.ensure_weight_tying or model.lm_head.weight is not None:
        return keys
    single = [module for module in named_nodes(model, Adapted) if not module.layers]
    embedding = next(module.name for module in single if module.node is model.model.embed_tokens)
    head = next(module.name for module in single if module.node is model.lm_head)
    if not any(_is_saved([key], embedding) or _is_saved([key], head) for key in keys):
        return keys
    return (*(key for key in keys if not _is_saved([key], head)), embedding)


def _is_saved(keys: Sequence[str], module: str) -> bool:
    """Whether the module, or one that it is a part of, ends as one of `modules_to_save`."""
    parts = module.split(".")
    wholes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(whole.endswith(key) for whole in wholes for key in keys)


def _check_saved(model: CausalLM, modules: list[Named], keys: Sequence[str], adapted: set[str]) -> None:
    names = [name for module in modules for name in module.names()]
    if unmatched := [key for key in keys if not any(_is_saved([key], name) for name in names)]:
        known = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"modules_to_save: {', '.join(map(repr, unmatched))} matches no module of this {model.config.model_type} "
            f"model. The names that exist: {', '.join(known)}"
        )
    if both := sorted(name for name in adapted if _is_saved(keys, name)):
        raise ValueError(
            f"modules_to_save: {', '.join(both[:4])}{' …' if len(both) > 4 else ''} would learn as a whole and has an "
            "adapter too: leave it out of target_modules (or name it in exclude_modules), or out of modules_to_save"
        )
    for module in modules:
        if module.node.weight is not None and isinstance(module.node.weight.get_value(), QuantizedArray):
            if saved := [name for name in module.names() if _is_saved(keys, name)]:
                raise ValueError(
                    f"modules_to_save: {saved[0]} is quantised, and its codes cannot learn: load the model with "
                    "load_in_16bit=True, or give it an adapter"
                )
