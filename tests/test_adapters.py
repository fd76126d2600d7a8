"""PEFT's options for adapters, each walked once around: PEFT's adapter here, trained in both, saved here, loaded by
PEFT, merged and loaded by transformers."""

import re

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from helpers import load_folder, make_checkpoint, randomise_adapters
from walk import BLOCKS, IDS, largest_difference, logits_of, peft_model, save_peft, train_ours, walk

from jaxlora import lora, lora_init, quant
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters import peft as ours
from jaxlora.converters.export import save_merged
from jaxlora.converters.huggingface import CheckpointError
from jaxlora.layers import Linear
from jaxlora.loss import causal_lm_loss
from jaxlora.model import named_nodes

# ---- Which modules, and with what rank -------------------------------------------------------------------------------

SELECTIONS = {
    "regex": dict(target_modules=r"model\.layers\.[02]\.(mlp\.up_proj|self_attn\.q_proj)"),
    "paths": dict(target_modules=["model.layers.1.mlp.up_proj", "layers.2.mlp.down_proj", "k_proj"]),
    "exclude": dict(target_modules=BLOCKS, exclude_modules=["layers.0.mlp.up_proj", "o_proj"]),
    "exclude-regex": dict(target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.1\..*"),
    "layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    "one-layer": dict(target_modules=["v_proj"], layers_to_transform=1),
    "ranks": dict(
        rank_pattern={"q_proj": 7, r"model\.layers\.1\.mlp\.up_proj": 2, "layers.2.mlp.up_proj": 5},
        alpha_pattern={"q_proj": 3, r"layers\.0\.mlp\..*": 11.5},
        use_rslora=True,
    ),
}


@pytest.mark.parametrize("option", ["regex", "layers", "ranks"])
def test_selections_walk_around(option, tmp_path):
    # Three layers in two runs; in the first model all three are one stack.
    walk("qwen3-biases-windows" if option == "layers" else "llama", tmp_path, **SELECTIONS[option])


@pytest.mark.parametrize("option", SELECTIONS)
def test_fresh_adapters_are_on_pefts_modules(option, tmp_path):
    options = SELECTIONS[option]
    theirs = peft_model(make_checkpoint("llama", tmp_path), **options)
    model = load_folder(tmp_path)
    lora.add_adapters(model, LoraConfig(**{"target_modules": BLOCKS, "r": 4, **options}), jax.random.key(0))
    shapes = {key: value.shape for key, value in ours.adapter_tensors(model).items()}
    state = peft.get_peft_model_state_dict(theirs)
    assert shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()


def test_padding_is_never_seen_and_never_learns(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path)
    lora.add_adapters(model, LoraConfig(target_modules=BLOCKS, r=4, **SELECTIONS["ranks"]), jax.random.key(0))
    randomise_adapters(model)  # the padding too
    (linear,) = (x for x in lora.adapters(model) if x.name.endswith("up_proj"))
    node = linear.node
    assert node.lora_ranks == (4, 2, 5)
    before, tensors = model(jnp.asarray(IDS)), ours.adapter_tensors(model)
    assert np.any(node.lora_B.get_value()[1, :, 2:])
    for variable, padding in ((node.lora_A, np.s_[1, 2:]), (node.lora_B, np.s_[1, :, 2:])):
        variable.set_value(variable.get_value().at[padding].set(1e3))
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), before)
    graphdef, trainable, frozen = lora.partition(model)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    gradient = jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0])(trainable)
    nnx.update(model, gradient)
    assert not np.any(node.lora_A.get_value()[1, 2:]) and not np.any(node.lora_B.get_value()[1, :, 2:])
    assert np.all(np.any(node.lora_A.get_value()[1, :2], axis=-1))
    assert {key: value.shape for key, value in ours.adapter_tensors(model).items()} == {
        key: value.shape for key, value in tensors.items()
    }


# ---- Where adapters start --------------------------------------------------------------------------------------------


def fresh(folder, quant_config=None, seed=0, **options):
    model = load_folder(folder, quant_config=quant_config)
    config = LoraConfig(**{"target_modules": ["up_proj", "k_proj"], "r": 4, "lora_alpha": 6, **options})
    lora.add_adapters(model, config, jax.random.key(seed))
    return model, config


def starts(model):
    """{name: (A, B)} as they stand in the model."""
    nodes = [(name, i, x.node) for x in lora.adapters(model) for i, name in enumerate(x.names())]
    return {name: tuple(np.asarray(m.get_value())[i] for m in (n.lora_A, n.lora_B)) for name, i, n in nodes}


@pytest.mark.parametrize("kind", [False, "gaussian", "orthogonal"])
def test_starts_hold_what_pefts_hold(kind, checkpoint):
    model, _ = fresh(checkpoint, init_lora_weights=kind, r=8)
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint),
        peft.LoraConfig(r=8, target_modules=["up_proj", "k_proj"], init_lora_weights=kind),
    )
    state = {key: value.numpy() for key, value in peft.get_peft_model_state_dict(theirs).items()}
    for name, (a, b) in starts(model).items():
        expected_a, expected_b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        if kind == "orthogonal":
            assert np.abs(b @ a).max() < 1e-6 and np.abs(expected_b @ expected_a).max() < 1e-6
            assert np.any(b)
        for found, expected in ((a, expected_a), (b, expected_b)):
            assert found.shape == expected.shape
            assert np.std(found) == pytest.approx(np.std(expected), rel=0.35, abs=1e-9)
            if kind is False:  # both uniform within 1 / sqrt(inputs)
                bound = found.shape[1] ** -0.5
                assert 0.9 * bound < np.abs(found).max() <= bound
    again, _ = fresh(checkpoint, init_lora_weights=kind, r=8)
    other, _ = fresh(checkpoint, init_lora_weights=kind, r=8, seed=1)
    for name, (a, _) in starts(model).items():
        np.testing.assert_array_equal(a, starts(again)[name][0])
        assert not np.array_equal(a, starts(other)[name][0])


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_16", "olora"])
def test_starts_from_the_weight_equal_pefts(kind, checkpoint):
    options = dict(r=4, lora_alpha=6, init_lora_weights=kind, target_modules=["up_proj", "k_proj"])
    options["rank_pattern"] = {r"layers\.1\.mlp\.up_proj": 6}
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint), peft.LoraConfig(**options)
    )
    plain = load_folder(checkpoint)
    model, config = fresh(checkpoint, **options)
    assert largest_difference(model(jnp.asarray(IDS)), plain(jnp.asarray(IDS))) < 5e-5
    for linear in lora.adapters(model):
        for i, name in enumerate(linear.names()):
            module, rank = theirs.get_submodule(f"base_model.model.{name}"), config.rank_of(name)
            a, b = (np.asarray(v.get_value())[i] for v in (linear.node.lora_A, linear.node.lora_B))
            a, b = a[:rank], b[:, :rank]
            expected = (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach().numpy()
            base, expected_base = (
                np.asarray(linear.node.weight.get_value())[i],
                module.base_layer.weight.detach().numpy(),
            )
            if "niter" in kind:  # two random sketches: not the same directions, but as much of the weight
                assert np.linalg.norm(b @ a) == pytest.approx(np.linalg.norm(expected), rel=3e-2)
                assert np.linalg.norm(base) == pytest.approx(np.linalg.norm(expected_base), rel=3e-2)
            else:
                assert np.linalg.norm(b @ a - expected) < 2e-5 * np.linalg.norm(expected)
                assert np.linalg.norm(base - expected_base) < 2e-5 * np.linalg.norm(base)
            spectrum = np.linalg.svd(b @ a, compute_uv=False)[:rank]
            if kind != "olora":  # B and A share the singular values evenly
                np.testing.assert_allclose(np.linalg.norm(b, axis=0), spectrum**0.5, rtol=1e-3)
                np.testing.assert_allclose(np.linalg.norm(a, axis=1), spectrum**0.5, rtol=1e-3)
            else:  # B is orthonormal
                np.testing.assert_allclose(b.T @ b, np.eye(rank), atol=1e-5)
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_starts_from_the_weight_walk_around(kind, tmp_path):
    model, config = walk("llama", tmp_path, converted=True, init_lora_weights=kind, r=2, use_rslora=kind == "olora")
    assert config.init_lora_weights == kind and config.r == 2
    plain = load_folder(tmp_path / "base")
    saved = ours.load_adapter(plain, tmp_path / "ours")
    assert saved.r == 4 and saved.init_lora_weights is True
    assert largest_difference(plain(jnp.asarray(IDS)), model(jnp.asarray(IDS))) < 5e-5


def test_olora_on_a_quantised_base_quantises_what_is_left(checkpoint):
    model, config = fresh(checkpoint, QuantConfig(), init_lora_weights="olora")
    plain = load_folder(checkpoint, quant_config=QuantConfig())
    before = {x.name: x.node.weight.get_value() for x in named_nodes(plain, Linear)}
    for linear in lora.adapters(model):
        weight = np.asarray(quant.dequantize(before[linear.name], jnp.float32))
        stored = linear.node.weight.get_value()
        assert isinstance(stored, quant.QuantizedArray) and stored.shape == before[linear.name].shape
        a, b = (np.asarray(v.get_value()) for v in (linear.node.lora_A, linear.node.lora_B))
        rest = jnp.asarray(weight - config.scaling * np.matmul(b, a))
        expected = np.asarray(quant.dequantize(quant.quantize(rest), jnp.float32))
        np.testing.assert_allclose(quant.dequantize(stored, jnp.float32), expected, atol=1e-5)


@pytest.mark.parametrize("bits, rounds", [(4, 1), (4, 3), (8, 2)])
def test_loftq_is_that_of_bitsandbytes_and_svd(bits, rounds):
    """PEFT's `loftq_init`, which itself wants a GPU: its quantisation and its decomposition, in turn."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32))
    low = torch.zeros(())
    for _ in range(rounds):
        if bits == 4:
            codes, state = bnb.quantize_4bit(weight - low, blocksize=64, quant_type="nf4", compress_statistics=False)
            held = bnb.dequantize_4bit(codes, state)
        else:
            codes, scales, _ = bnb.int8_vectorwise_quant((weight - low).half())  # as Int8Params does
            held = bnb.int8_vectorwise_dequant(codes, scales)
        u, s, vh = torch.linalg.svd(weight - held, full_matrices=False)
        low = (u[:, :6] * s[:6]) @ vh[:6]
    stored, (a, b) = lora_init.loftq(jnp.asarray(weight.numpy()), 6, 1.5, bits=bits, rounds=rounds)
    np.testing.assert_allclose(quant.dequantize(stored, jnp.float32), held.numpy(), atol=2e-5)
    np.testing.assert_allclose(1.5 * (b @ a), low.numpy(), atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [0, 2]}], ids=["all", "some"])
def test_loftq_starts_nearer_than_quantising_does(options, checkpoint, tmp_path):
    plain = load_folder(checkpoint)
    model, config = fresh(checkpoint, init_lora_weights="loftq", r=8, target_modules=BLOCKS, **options)
    for x in lora.adapters(model):
        assert isinstance(x.node.weight.get_value(), quant.QuantizedArray) == (not options)
        held = np.asarray(lora.float_weight(model, x.node, 0))
        exact = np.asarray(plain_weight(plain, x.name)[0])
        start = held + np.asarray(lora.delta_weight(x.node, 0))
        assert np.linalg.norm(start - exact) < 0.8 * np.linalg.norm(held - exact)
    train_ours(model)
    logits = model(jnp.asarray(IDS))
    ours.save_adapter(model, tmp_path / "adapter", config=config, base=str(checkpoint))
    again = load_folder(checkpoint)
    assert ours.load_adapter(again, tmp_path / "adapter").init_lora_weights == "loftq"
    np.testing.assert_array_equal(again(jnp.asarray(IDS)), logits)
    save_merged(model, tmp_path / "merged", base=checkpoint)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert largest_difference(logits, logits_of(merged)) < 5e-5


def plain_weight(model, name):
    return next(x.node.weight.get_value() for x in named_nodes(model, Linear) if x.name == name)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(init_lora_weights="pissa"), TypeError, "is quantised: load the model with load_in_16bit=True, or"),
        (dict(init_lora_weights="olora", r=21), ValueError, r"k_proj .*rank says, 21, but it is \[20, 48\]"),
        (dict(init_lora_weights="pissa_niter_x"), ValueError, "'pissa_niter_x' is not one of"),
        (dict(init_lora_weights="orthogonal", r=3), ValueError, r"needs even ranks, found \[3\]"),
    ],
    ids=str,
)  # fmt: skip
def test_starts_that_do_not_work(options, error, message, checkpoint):
    with pytest.raises(error, match=message):
        fresh(checkpoint, QuantConfig(), **options)


def test_a_random_start_cannot_be_taken_out_again(checkpoint, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    save_peft(peft_model(theirs, init_lora_weights="pissa_niter_4"), tmp_path)
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa_niter_4' is not supported in a file"):
        ours.load_adapter(load_folder(checkpoint), tmp_path)


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(target_modules="q_proj"), ValueError, "'q_proj' as a regular expression for whole paths matches no"),
        (dict(target_modules="(q_proj"), ValueError, r"target_modules: '\(q_proj' is no regular expression"),
        (dict(target_modules=()), ValueError, "target_modules is empty"),
        (dict(exclude_modules=BLOCKS), ValueError, "leaves no linear layer of this llama model, with exclude_modules="),
        (dict(layers_to_transform=[1, 3]), ValueError, r"layers_to_transform names \[3\], but .* are 0 to 2"),
        (dict(layers_to_transform=[]), ValueError, "layers_to_transform is empty"),
        (dict(layers_to_transform=1, layers_pattern="h"), ValueError, "leaves no linear layer .* layers_pattern='h'"),
        (dict(layers_pattern="layers"), ValueError, "layers_pattern says nothing without layers_to_transform"),
        (dict(target_modules="all-linear", layers_to_transform=1), ValueError, "needs target_modules as a list"),
        (dict(rank_pattern={"q_proj": 0}), ValueError, "the rank of 'q_proj' must be larger than 0, found 0"),
        (dict(rank_pattern={"q_proj": True}), TypeError, "the rank of 'q_proj' must be an integer, found True"),
        (dict(alpha_pattern={"[": 1}), ValueError, r"alpha_pattern: '\[' is no regular expression"),
    ],
    ids=str,
)
def test_selections_that_do_not_work(options, error, message, llama):
    with pytest.raises(error, match=message):
        lora.add_adapters(llama, LoraConfig(**{"target_modules": BLOCKS, **options}), jax.random.key(0))
    assert not lora.adapters(llama)


@pytest.mark.parametrize(
    "options", [dict(exclude_modules=["query"]), dict(rank_pattern={"query": 2}), dict(exclude_modules="q_proj")]
)
def test_what_changes_nothing_is_said(options, llama):
    with pytest.warns(UserWarning, match=re.escape("_proj' matches no" if "q_proj" in str(options) else "'query'")):
        lora.add_adapters(llama, LoraConfig(r=4, **options), jax.random.key(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


@pytest.fixture
def llama(checkpoint):
    return load_folder(checkpoint)
