"""The vocabulary of a model: a tokenizer that can be relied on, and rows for tokens that are new.

A checkpoint's tokenizer is repaired in three things that training and sampling lean on (`repair_tokenizer`): a pad
token that is not the end of a text, padding on the left, and a chat template that opens the assistant's turn when it is
asked to. New tokens get rows in the embedding and the head (`add_new_tokens`); both then learn as a whole, and go with
the adapter.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from jaxlora import lora
from jaxlora.config import LoraConfig
from jaxlora.model import CausalLM, named_nodes
from jaxlora.sharding import variable_sharding
from jaxlora.variables import Adapted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


# ---- The tokenizer ---------------------------------------------------------------------------------------------------

# What published vocabularies set aside for padding, or for nothing; a name that ends with "*" is the beginning of many.
_SPARE_TOKENS = (
    "<|finetune_right_pad_id|>", "<|finetune_right_pad|>", "<pad>", "[PAD]", "<PAD>", "<|endoftext|>", "<fim_pad>",
    "<｜▁pad▁｜>", "[MASK]", "<|reserved*", "<|placeholder*", "<|dummy_*", "[control*", "|<EXTRA_TOKENS_*",
    "<SPECIAL_*", "<unused*", "<|EOT|>", "<|reject-unknown|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_NEW_PAD = "<｜PAD▁TOKEN｜>"


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, hf_config: Mapping[str, Any], rows: int) -> None:
    """Give a tokenizer a pad token of its own, padding on the left, and a chat template with a generation prompt.

    A pad token is replaced that is missing, that is the end of a text (a program that ignores padding would ignore that
    too, and the model never learn to stop), or that the embedding has no row of. What replaces it is the first that
    there is of `_SPARE_TOKENS` (of many of a kind the last), any other token in brackets with "pad" in its name, the
    unknown token, the pad token of config.json, and a new token if the embedding has a row to spare for it.

    Args:
        tokenizer: is changed in place.
        hf_config: config.json.
        rows: number of rows of the embedding.
    """
    tokenizer.padding_side = "left"  # where `generate` wants it; the trainer pads by itself
    _repair_pad_token(tokenizer, hf_config, rows)
    _repair_generation_prompt(tokenizer)


def _repair_pad_token(tokenizer: Any, hf_config: Mapping[str, Any], rows: int) -> None:
    others = hf_config.get("eos_token_id")  # None, an id or a list of them
    ends = {tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])}
    pad = tokenizer.pad_token_id
    if pad is not None and pad != tokenizer.eos_token_id and pad < rows:
        return

    def fits(index: Any) -> bool:
        return isinstance(index, int) and 0 <= index < rows and index not in ends

    spare = _spare_token({index: str(t) for index, t in tokenizer.added_tokens_decoder.items() if fits(index)})
    if spare is None and tokenizer.unk_token is not None and fits(tokenizer.unk_token_id):
        spare = tokenizer.unk_token
    if spare is None and fits(hf_config.get("pad_token_id")):
        spare = tokenizer.convert_ids_to_tokens(hf_config["pad_token_id"])
    if spare is None and len(tokenizer) < rows:
        spare = _NEW_PAD
    if spare is None:
        warnings.warn(
            f"the tokenizer's pad token is {tokenizer.pad_token!r}, and its vocabulary has no other token to spare and "
            "the model no row for a new one: add one with add_new_tokens if another program is to pad with it",
            stacklevel=4,
        )
        return
    logger.info("the pad token is %s now, in place of %s", spare, tokenizer.pad_token)
    tokenizer.add_special_tokens({"pad_token": spare})


def _spare_token(added: Mapping[int, str]) -> str | None:
    """The added token to pad with, of {id: token}."""
    last_first = [added[index] for index in sorted(added, reverse=True)]
    for name in _SPARE_TOKENS:
        for token in last_first:
            if token == name or (name.endswith("*") and token.startswith(name[:-1])):
                return token
    brackets = (("<", ">"), ("[", "]"))
    for token in last_first:
        if "pad" in token.lower() and (token[:1], token[-1:]) in brackets:
            return token
    return None


def _repair_generation_prompt(tokenizer: Any) -> None:
    """Let a chat template that ignores `add_generation_prompt` heed it.

    What opens the assistant's turn is what the template writes between a question and its answer.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return
    question, answer = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}

    def render(*messages: dict[str, str], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    try:
        asked, prompted, answered = render(question), render(question, prompt=True), render(question, answer)
    except Exception as error:  # a template can fail in any way, and one that wants more than this is none of ours
        logger.info("the chat template was not looked at: %s", error)
        return
    opening, found, _ = answered.removeprefix(asked).partition(answer["content"])
    if prompted != asked or not answered.startswith(asked) or not found or not opening.strip():
        return
    tokenizer.chat_template = template + "{% if add_generation_prompt %}{{ " + json.dumps(opening) + " }}{% endif %}"
    if render(question, prompt=True) != asked + opening or render(question, answer) != answered:
        tokenizer.chat_template = template
        warnings.warn(
            f"the chat template ignores add_generation_prompt, and appending {opening!r} for it changes more than "
            "that: prompts will lack the opening of the assistant's turn",
            stacklevel=4,
        )
        return
    logger.info("the chat template appends %r now where add_generation_prompt asks for it", opening)


# ---- Rows of the embedding and the head ------------------------------------------------------------------------------


def add_new_tokens(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str],
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Add tokens to a tokenizer and rows for them to a model, in place, before it gets adapters.

    The rows start as the mean of the rows that were ever trained (a row of zeros never was), or part of the way from
    there to the mean of the rows of the token's old pieces. `get_peft_model` then makes the embedding and the head
    learn, and they are saved with the adapter.

    Args:
        new_tokens: those that the tokenizer has already are left alone, with a warning.
        method: "mean" or "interpolation".
        interpolation: the part of the way, from 0 to 1.

    Raises:
        ValueError: no token, an unknown method, a share outside [0, 1], a model with adapters, or more rows than
            the inputs of layers have, where a model has such.
    """
    if isinstance(new_tokens, str) or not new_tokens:
        raise ValueError(f"new_tokens should be a list of at least one token, found {new_tokens!r}")
    if method not in ("mean", "interpolation"):
        raise ValueError(f'method {method!r} is not "mean" or "interpolation"')
    if not 0.0 <= interpolation <= 1.0:
        raise ValueError(f"interpolation is a share, from 0 to 1; found {interpolation}")
    _refuse_adapters(model)
    _check_inputs_of_layers(model, len(tokenizer) + len(set(new_tokens) - set(tokenizer.get_vocab())))
    known = tokenizer.get_vocab()
    if old := [token for token in new_tokens if token in known]:
        warnings.warn(f"the tokenizer has {old} already: they are left as they are", stacklevel=2)
    new = [token for token in dict.fromkeys(new_tokens) if token not in known]
    if not new:
        return
    # Before they are tokens of their own, since afterwards each is its only piece.
    pieces = [jnp.asarray(tokenizer(token, add_special_tokens=False)["input_ids"], jnp.int32) for token in new]
    tokenizer.add_tokens(new)
    ids = jnp.asarray(tokenizer.convert_tokens_to_ids(new), jnp.int32)
    share = interpolation if method == "interpolation" else 0.0

    def fill(table: Float[Array, "rows d"], trained: Array) -> Float[Array, "more d"]:
        mean = _mean(table, trained)
        starts = [mean + share * (jnp.mean(table[p].astype(jnp.float32), axis=0) - mean) for p in pieces]
        table = _longer(table, max(len(tokenizer), table.shape[0]), mean)
        return table.at[ids].set(jnp.stack(starts).astype(table.dtype))

    _replace_tables(model, fill)


def resize_vocabulary(model: CausalLM, rows: int, key: Any) -> None:
    """Give the embedding and the head more rows, in place, before the model gets adapters.

    New rows are drawn, as transformers does, from a normal distribution with the mean of the trained rows, and 1e-9 of
    their covariance: close to the mean, and no two alike.

    Raises:
        ValueError: fewer rows than there are, a model with adapters, or one that has other inputs of each layer.
    """
    if rows < model.config.vocab_size:
        raise ValueError(
            f"resize_model_vocab={rows} would cut off rows: the model has {model.config.vocab_size}, and keeps them"
        )
    if rows == model.config.vocab_size:
        return
    _refuse_adapters(model)
    _check_inputs_of_layers(model, rows)
    keys = iter(jax.random.split(key))

    def fill(table: Float[Array, "rows d"], trained: Array) -> Float[Array, "more d"]:
        mean, count = _mean(table, trained), rows - table.shape[0]
        draws = jnp.where(trained, jax.random.normal(next(keys), (count, table.shape[0]), jnp.float32), 0.0)
        # A sum of n centred rows, each times a standard normal number, has n times their covariance.
        spread = draws @ table.astype(jnp.float32) - draws.sum(axis=1, keepdims=True) * mean
        return _longer(table, rows, mean + jnp.sqrt(1e-9 / jnp.sum(trained, dtype=jnp.float32)) * spread)

    _replace_tables(model, fill)


def learning_rows(model: CausalLM, config: LoraConfig) -> LoraConfig:
    """`config` for a model with new rows: the embedding and the head learn as a whole, together if they are tied."""
    if not model.has_new_rows:
        return config
    is_tied = model.lm_head.weight is None
    learning = (model.model.embed_tokens,) if is_tied else (model.model.embed_tokens, model.lm_head)
    names = [module.name for module in named_nodes(model, Adapted) if any(module.node is node for node in learning)]
    given = config.modules_to_save or ()
    missing = [name for name in names if not any(name == one or name.endswith("." + one) for one in given)]
    return dataclasses.replace(
        config,
        modules_to_save=(*given, *sorted(name.rsplit(".", 1)[-1] for name in missing)),
        ensure_weight_tying=config.ensure_weight_tying or is_tied,
    )


def _refuse_adapters(model: CausalLM) -> None:
    if lora.adapters(model) or any(lora.trained_copies(model)):
        raise ValueError("the model has adapters already: give it new tokens before get_peft_model")


def _check_inputs_of_layers(model: CausalLM, rows: int) -> None:
    has = model.config.vocab_size_per_layer_input if model.config.hidden_size_per_layer_input else rows
    if rows > has:
        raise ValueError(
            f"new tokens would need {rows} rows of embed_tokens_per_layer, which has {has} and is not made longer: use "
            "tokens that the tokenizer has to spare, such as Gemma's <unused0>"
        )


def _mean(table: Float[Array, "rows d"], trained: Array) -> Float[Array, " d"]:
    """Mean of the trained rows, float32."""
    return jnp.sum(jnp.where(trained[:, None], table.astype(jnp.float32), 0.0), axis=0) / jnp.sum(
        trained, dtype=jnp.float32
    )


def _longer(table: Float[Array, "rows d"], rows: int, start: Array) -> Float[Array, "more d"]:
    """`table` with more rows, of which the new ones are `start` [d] or [new, d]."""
    new = jnp.broadcast_to(start, (rows - table.shape[0], table.shape[1])).astype(table.dtype)
    return jnp.concatenate([table, new])


def _replace_tables(model: CausalLM, fill: Callable[[Array, Array], Array]) -> None:
    """Put `fill(table, trained)` in place of the embedding and the head, and the new size into the configurations.

    trained: which rows of the embedding are not zeros, [rows].
    """
    embedding, head = model.model.embed_tokens, model.lm_head
    trained = jnp.max(jnp.abs(jax.device_put(embedding.weight.get_value(), jax.memory.Space.Device)), axis=1) > 1e-16
    for module in (embedding,) if head.weight is None else (embedding, head):
        variable, old = module.weight, module.weight.get_value()
        new = fill(jax.device_put(old, jax.memory.Space.Device), trained)
        place = old.sharding
        # A mesh may divide the new number of rows otherwise, or not at all.
        if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
            place = variable_sharding(new, variable.get_metadata()["axes"], place.mesh)
        variable.set_value(jax.device_put(new, place))
    rows = embedding.weight.get_value().shape[0]
    embedding.in_features = head.out_features = rows
    model.config = dataclasses.replace(model.config, vocab_size=rows)
    hf_config = model.hf_config
    hf_config.get("text_config", hf_config)["vocab_size"] = rows
    model._hf_config = json.dumps(hf_config)
    model.has_new_rows = True
