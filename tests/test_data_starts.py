"""EVA and CorDA: adapters that start from data, against PEFT's on the same model and the same batches."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import load_folder, make_checkpoint, random_ids
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.numpy import load_file
from walk import (
    BLOCKS,
    IDS,
    largest_difference,
    live_tensors,
    logits_of,
    save_peft,
    train_ours,
    train_peft,
)

from jaxlora import FastLanguageModel, lora
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters import peft as ours
from jaxlora.converters.export import save_merged
from jaxlora.converters.huggingface import CheckpointError
from jaxlora.layer_inputs import batches as batches_of
from jaxlora.layer_inputs import fold, layer_inputs
from jaxlora.layers import Linear
from jaxlora.model import named_nodes
from jaxlora.quant import QuantizedArray, dequantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning"),
]


def marked(names, slow):
    """Of like parts as others, which take long: with the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


def plain_torch(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def data(count=3, batch=8, length=24, masked=True):
    """Batches with padding on the right and labels of which some do not count."""
    batches = []
    for i in range(count):
        ids = random_ids(batch, length, seed=i)
        attention_mask = np.ones_like(ids)
        labels = ids.astype(np.int64)
        if masked:
            attention_mask[1, 17:] = 0
            attention_mask[4, 9:] = 0
            labels = np.where(attention_mask == 0, -100, labels)
            labels[:, :5] = -100
        batches.append({"input_ids": ids, "attention_mask": attention_mask, "labels": labels})
    return batches


def as_torch(batches):
    return [{name: torch.from_numpy(value).long() for name, value in batch.items()} for batch in batches]


def fresh(folder, batches, quant_config=None, **options):
    model = load_folder(folder, quant_config=quant_config)
    config = LoraConfig(**{"target_modules": BLOCKS, "r": 4, "lora_alpha": 6, **options})
    return model, lora.add_adapters(model, config, jax.random.key(0), batches)


# ---- EVA -------------------------------------------------------------------------------------------------------------


class ExactPCA(IncrementalPCA):
    """PEFT's, with its own full decomposition in place of its random sketch of it."""

    def __init__(self, **options):
        super().__init__(**options | {"lowrank": False})


def peft_eva(folder, batches, exact=True, eva_config=None, **options):
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": BLOCKS, "task_type": "CAUSAL_LM", **options},
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(**eva_config or {}),
    )
    model = peft.get_peft_model(plain_torch(folder), config)
    exactly = mock.patch("peft.tuners.lora.eva.IncrementalPCA", ExactPCA) if exact else contextlib.nullcontext()
    with exactly:
        peft.initialize_lora_eva_weights(model, as_torch(batches), show_progress_bar=False)
    return model


def peft_matrices(model):
    return {
        key.removeprefix("base_model.model.").removesuffix(".weight"): value.numpy()
        for key, value in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def our_matrices(model):
    return {
        key.removeprefix("base_model.model.").removesuffix(".weight"): value
        for key, value in live_tensors(model).items()
    }


def angle(found, expected):
    """The largest principal angle between two spaces of rows, as its sine."""
    q, p = (np.linalg.qr(x.T.astype(np.float64))[0] for x in (found, expected))
    return np.linalg.norm(q - p @ (p.T @ q), 2)


EVA = {
    "plain": dict(),
    "rho-1": dict(eva_config=dict(rho=1.0)),
    "whitened": dict(eva_config=dict(whiten=True)),
    "all-tokens": dict(eva_config=dict(use_label_mask=False)),
    "alpha-stays": dict(eva_config=dict(adjust_scaling_factors=False), use_rslora=True),
    "patterns": dict(rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 3}, eva_config=dict(rho=1.5)),
    "some": dict(target_modules=["q_proj", "down_proj"], eva_config=dict(rho=3.0, tau=0.999)),
}


@pytest.mark.parametrize("option", marked(EVA, ("rho-1", "all-tokens", "some")))
def test_eva_chooses_pefts_ranks_and_directions(option, checkpoint):
    options, batches = EVA[option], data()
    theirs = peft_eva(checkpoint, batches, **options)
    model, config = fresh(checkpoint, batches, init_lora_weights="eva", **options)
    expected, found = peft_matrices(theirs), our_matrices(model)
    assert {name: value.shape for name, value in found.items()} == {k: v.shape for k, v in expected.items()}
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()
    assert sum(len(a) for name, a in found.items() if "lora_A" in name) == sum(
        config.rank_of(name) for name in config.target_modules
    )
    for name, value in expected.items():
        if "lora_B" in name:
            assert not np.any(found[name])
        else:
            module = theirs.get_submodule("base_model.model." + name.removesuffix(".lora_A"))
            assert config.scaling_of(name.removesuffix(".lora_A")) == pytest.approx(module.scaling["default"])
            a = found[name]
            if option == "whitened" and not name.endswith(("o_proj.lora_A", "down_proj.lora_A")):
                # PEFT 0.21 whitens in place, and so again for each reader of the same input.
                a, value = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, value))
            assert angle(a, value) < 1e-3, name
            assert largest_difference(a, value) < 5e-3, name  # one by one too, with their signs
            lengths = np.linalg.norm(found[name], axis=1)
            assert np.all(lengths < 0.9) if option == "whitened" else np.allclose(lengths, 1.0, atol=1e-5)
    plain = load_folder(checkpoint)
    assert largest_difference(model(jnp.asarray(IDS)), plain(jnp.asarray(IDS))) < 1e-5
    if "rho" not in str(options) or option == "some":
        assert len({config.rank_of(name) for name in config.target_modules}) > 1  # the ranks did move


def test_eva_is_the_components_of_all_that_counts(checkpoint):
    """One batch: the principal components, from numpy, of the inputs that transformers' modules get."""
    batches = data(count=1)
    model, _ = fresh(checkpoint, batches, init_lora_weights="eva", eva_config=dict(rho=1.0))
    theirs, inputs = plain_torch(checkpoint), {}
    for name, module in theirs.named_modules():
        module.register_forward_hook(lambda module, x, y, name=name: inputs.update({name: x}))
    (batch,) = as_torch(batches)
    with torch.no_grad():
        theirs(**{k: v for k, v in batch.items() if k != "labels"})
    counts = (batch["labels"] != -100).numpy()
    for name, a in our_matrices(model).items():
        if name.endswith("lora_A"):
            rows = inputs[name.removesuffix(".lora_A")][0].numpy()[counts]
            vh = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2]
            assert angle(a, vh[:4]) < 1e-3, name


@pytest.mark.parametrize("scheme", marked(["nf4", "int8"], ("int8",)))
def test_eva_on_quantised_weights(scheme, checkpoint):
    """The inputs of a quantised model are those of the dense one with the same weights."""
    quantised = load_folder(checkpoint, quant_config=QuantConfig(scheme=scheme))
    dense = load_folder(checkpoint)
    for x, y in zip(named_nodes(quantised, Linear), named_nodes(dense, Linear), strict=True):
        if isinstance(x.node.weight.get_value(), QuantizedArray):
            y.node.weight.set_value(dequantize(x.node.weight.get_value(), jnp.float32))
    config = LoraConfig(r=3, init_lora_weights="eva")
    configs = [lora.add_adapters(model, config, jax.random.key(0), data()) for model in (quantised, dense)]
    assert configs[0] == configs[1]
    found, expected = our_matrices(quantised), our_matrices(dense)
    for name, value in expected.items():
        assert largest_difference(found[name], value) < 5e-3


def test_eva_walks_around(checkpoint, tmp_path):
    """From PEFT here, four steps in both, saved here, loaded by PEFT, merged."""
    batches = data()
    theirs = peft_eva(checkpoint, batches)
    for_both = {"init_lora_weights": "eva", "lora_alpha": 6}
    model, config = fresh(checkpoint, batches, **for_both)
    save_peft(theirs, tmp_path / "start")
    loaded = load_folder(checkpoint)
    ours.load_adapter(loaded, tmp_path / "start")
    for name, value in our_matrices(loaded).items():
        assert largest_difference(value, peft_matrices(theirs)[name]) == 0.0
    start = our_matrices(model)
    train_peft(theirs)
    for one in (model, loaded):
        train_ours(one)
        for name, value in peft_matrices(theirs).items():
            moved = np.abs(value - start[name]).max()
            assert moved > 0 and largest_difference(our_matrices(one)[name], value) < 2e-2 * moved + 1e-6, name
    logits = model(jnp.asarray(IDS))
    assert largest_difference(loaded(jnp.asarray(IDS)), logits_of(theirs)) < 5e-5
    ours.save_adapter(model, tmp_path / "ours", config=config, base=str(checkpoint))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert largest_difference(logits, logits_of(again)) < 5e-5
    save_merged(model, tmp_path / "merged", base=checkpoint)
    assert largest_difference(logits, logits_of(plain_torch(tmp_path / "merged"))) < 5e-5


# ---- CorDA -----------------------------------------------------------------------------------------------------------


def peft_corda(folder, batches, method="ipm", **options):
    """PEFT's, whose hooks take one row at a time, without padding."""
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="it imports attrs, which PEFT does not ask for")
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": BLOCKS, "task_type": "CAUSAL_LM", **options},
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )
    model = plain_torch(folder)

    def run_model():
        for batch in as_torch(batches):
            for row in batch["input_ids"]:
                model(row[None])

    corda.preprocess_corda(model, config, run_model=run_model)
    return peft.get_peft_model(model, config)


CORDA = {
    "ipm": dict(),
    "kpm": dict(),
    "ipm-patterns": dict(rank_pattern={r"layers\.1\.mlp\.up_proj": 6}, alpha_pattern={"q_proj": 3}, lora_alpha=3),
    "kpm-rslora": dict(use_rslora=True, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("option", marked(CORDA, ("ipm-patterns",)))
def test_corda_takes_pefts_products_out_of_the_weights(option, checkpoint):
    options, batches, method = CORDA[option], data(masked=False), option[:3]
    theirs = peft_corda(checkpoint, batches, method, **options)
    model, config = fresh(
        checkpoint, batches, init_lora_weights="corda", corda_config=dict(corda_method=method), **options
    )
    for linear in lora.adapters(model):
        for i, name in enumerate(linear.names()):
            module, rank = theirs.get_submodule(f"base_model.model.{name}"), config.rank_of(name)
            a, b = (np.asarray(v.get_value())[i] for v in (linear.node.lora_A, linear.node.lora_B))
            a, b = a[:rank], b[:, :rank]
            expected_a, expected_b = (
                getattr(module, part)["default"].weight.detach().numpy() for part in ("lora_A", "lora_B")
            )
            expected = expected_b @ expected_a
            assert np.linalg.norm(b @ a - expected) < 1e-4 * np.linalg.norm(expected), name
            assert angle(a, expected_a) < 2e-4 and angle(b.T, expected_b.T) < 2e-4, name
            lengths = np.linalg.norm(a, axis=1), np.linalg.norm(expected_a, axis=1)  # the singular values' roots
            np.testing.assert_allclose(*lengths, rtol=1e-4)
            base, expected_base = (
                np.asarray(linear.node.weight.get_value())[i],
                module.base_layer.weight.detach().numpy(),
            )
            assert np.linalg.norm(base - expected_base) < 2e-5 * np.linalg.norm(base), name
    plain = load_folder(checkpoint)
    assert largest_difference(model(jnp.asarray(IDS)), plain(jnp.asarray(IDS))) < 5e-5
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_walks_around(method, checkpoint, tmp_path):
    """Four steps in both, PEFT's converted by itself and read here, ours saved and read by PEFT, and merged."""
    batches, options = data(masked=False), dict(r=3, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    theirs = peft_corda(checkpoint, batches, method, **options)
    model, config = fresh(
        checkpoint, batches, init_lora_weights="corda", corda_config=dict(corda_method=method), **options
    )
    settings = theirs.peft_config["default"]
    settings.init_lora_weights, settings.corda_config = True, None
    save_peft(theirs, tmp_path / "initial")
    start, before = our_matrices(model), {name: value.copy() for name, value in peft_matrices(theirs).items()}
    train_peft(theirs)
    train_ours(model)
    found, trained = our_matrices(model), peft_matrices(theirs)
    for name, value in trained.items():
        moved = np.abs(value - before[name]).max()
        axis = -1 if name.endswith("lora_A") else 0  # a direction has no sign: A and B may have the other one both
        signs = np.sign(np.sum(start[name] * before[name], axis=axis, keepdims=True))
        assert moved > 0 and largest_difference(signs * found[name], value) < 2e-2 * moved + 1e-6, name
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = load_folder(checkpoint)
    assert ours.load_adapter(loaded, tmp_path / "theirs").r == 6
    assert largest_difference(loaded(jnp.asarray(IDS)), logits_of(theirs)) < 5e-5

    logits = model(jnp.asarray(IDS))
    assert largest_difference(logits, load_folder(checkpoint)(jnp.asarray(IDS))) > 1e-2
    ours.save_adapter(model, tmp_path / "ours", config=config, base=str(checkpoint))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert largest_difference(logits, logits_of(again)) < 5e-5
    plain = load_folder(checkpoint)
    saved = ours.load_adapter(plain, tmp_path / "ours")
    assert (saved.r, saved.init_lora_weights, saved.corda_config) == (6, True, None)
    assert largest_difference(plain(jnp.asarray(IDS)), logits) < 5e-5
    save_merged(model, tmp_path / "merged", base=checkpoint)
    assert largest_difference(logits, logits_of(plain_torch(tmp_path / "merged"))) < 5e-5


def test_a_cordas_start_cannot_be_taken_out_again(checkpoint, tmp_path):
    theirs = peft_corda(checkpoint, data(masked=False), target_modules=["q_proj"])
    save_peft(theirs, tmp_path)
    with pytest.raises(CheckpointError, match="init_lora_weights='corda'.*path_initial_model_for_weight_conversion"):
        ours.load_adapter(load_folder(checkpoint), tmp_path)


def test_padding_is_no_part_of_the_covariances_and_a_file_keeps_them(checkpoint, tmp_path):
    batches = data(count=2)
    rows = [
        {"input_ids": batch["input_ids"][i : i + 1, : batch["attention_mask"][i].sum()]}
        for batch in batches
        for i in range(8)
    ]
    options = dict(init_lora_weights="corda", target_modules=["q_proj", "v_proj", "down_proj"])
    file = tmp_path / "new" / "covariances.safetensors"
    padded, _ = fresh(checkpoint, iter(batches), corda_config=dict(covariance_file=str(file)), **options)
    single, _ = fresh(checkpoint, rows, **options)
    again, _ = fresh(checkpoint, None, corda_config=dict(covariance_file=str(file)), **options)
    assert sorted(load_file(file)) == sorted(
        name.removesuffix(".lora_A") for name in our_matrices(padded) if "A" in name
    )
    for x, y, z in zip(*map(lora.adapters, (padded, single, again)), strict=True):
        one, two, three = (np.asarray(lora.delta_weight(module.node, 1)) for module in (x, y, z))
        assert np.linalg.norm(one - two) < 1e-3 * np.linalg.norm(one)
        np.testing.assert_array_equal(one, three)
    with pytest.raises(ValueError, match=r"has nothing for model.layers.0.self_attn.o_proj, expected \[60, 60\]"):
        fresh(
            checkpoint, None, corda_config=dict(covariance_file=str(file)), **options | {"target_modules": ["o_proj"]}
        )
    file.write_bytes(b"\x80\x02pickled")
    with pytest.raises(ValueError, match="is no safetensors file .*PEFT's are pickles"):
        fresh(checkpoint, None, corda_config=dict(covariance_file=str(file)), **options)


# ---- What is read, and the door --------------------------------------------------------------------------------------


def add_inputs(state, x, counts):
    return state + jnp.sum(jnp.where(counts[..., None], x, 0.0), axis=(0, 1))


@pytest.mark.parametrize(
    "name",
    marked(
        ["llama-tied", "gemma3_text", "gemma4_text", "phi3", "falcon", "qwen2_moe", "falcon_h1"], ("phi3", "falcon")
    ),
)
def test_inputs_are_those_of_the_modules_of_transformers(name, tmp_path):
    """Summed over tokens, for every linear: of runs, periods, fused projections, shared experts, mixers, the head."""
    theirs = make_checkpoint(name, tmp_path)
    model, sums = load_folder(tmp_path), {}
    names = {name for x in named_nodes(model, Linear) for name in x.names()}
    for path, module in theirs.named_modules():
        if path in names:
            module.register_forward_hook(
                lambda module, x, y, path=path: sums.update({path: x[0].reshape(-1, x[0].shape[-1]).sum(0).numpy()})
            )
    logits_of(theirs)
    sources = layer_inputs(model, list(named_nodes(model, Linear)))
    states = {source.path: jnp.zeros((source.depth, source.features)) for source in sources}
    slots = {source.path: jnp.arange(source.depth, dtype=jnp.int32) for source in sources}
    (batch,) = batches_of([{"input_ids": IDS}])
    found = fold(model, batch, states, slots, add_inputs)
    seen = {
        path: np.asarray(found[source.path][i])
        for source in sources
        for reader in source.readers
        for i, path in enumerate(reader.names())
    }
    assert seen.keys() == sums.keys() == names
    for path, value in sums.items():
        assert largest_difference(seen[path], value) < 1e-4 * max(np.abs(value).max(), 1.0), path


def test_the_door(checkpoint, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, dtype="float32")  # 4 bits
    options = dict(r=4, init_lora_weights="eva", init_dataset=data(), eva_config=peft.EvaConfig(rho=1.5), use_dora=True)
    plain = model(jnp.asarray(IDS))
    model = FastLanguageModel.get_peft_model(model, **options)
    assert largest_difference(model(jnp.asarray(IDS)), plain) < 1e-5
    ranks = {rank for x in lora.adapters(model) for rank in x.node.lora_ranks}
    assert len(ranks) > 1 and max(ranks) <= 6
    with pytest.warns(UserWarning, match="already has these LoRA adapters"):
        FastLanguageModel.get_peft_model(model, **options)
    with pytest.raises(TypeError, match="already has LoRA adapters with other settings"):
        FastLanguageModel.get_peft_model(model, **options | {"r": 5})
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", dtype="float32")
    assert largest_difference(again(jnp.asarray(IDS)), model(jnp.asarray(IDS))) < 1e-5
    again.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva"), init_dataset=data())
    again.set_adapter("other")
    assert again.lora_config is not None and sum(x.node.lora_ranks[0] for x in lora.adapters(again)) <= 4


def test_an_embedding_starts_as_ever(checkpoint):
    """It reads no vectors; PEFT starts it as True does, and warns."""
    options = dict(target_modules=["embed_tokens", "q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="embed_tokens reads no vectors, and starts as with init_lora_weights=True"):
        model, config = fresh(checkpoint, data(), init_lora_weights="eva", **options)
    plain, _ = fresh(checkpoint, None, **options)
    np.testing.assert_array_equal(*(one.model.embed_tokens.lora_B.get_value() for one in (model, plain)))
    assert config.rank_of("model.embed_tokens") == 4 and model.lm_head.lora_A is not None


FLAT = {"input_ids": np.zeros((1, 2, 3), np.int32)}


@pytest.mark.parametrize(
    "options, dataset, error, message",
    [
        (dict(init_lora_weights="eva"), None, ValueError, "'eva' starts from data: pass init_dataset"),
        (dict(init_lora_weights="corda"), None, ValueError, "init_lora_weights='corda' starts from data"),
        (dict(init_lora_weights="eva"), [], ValueError, "init_dataset is empty"),
        (dict(init_lora_weights="corda"), iter(()), ValueError, "init_dataset is empty"),
        (dict(init_lora_weights="eva"), 5, TypeError, "must be batches to iterate over, found int"),
        (dict(init_lora_weights="eva"), ["text"], TypeError, "batch 0 must be a dict with input_ids .*, found str"),
        (dict(init_lora_weights="corda"), [{"text": 1}], TypeError, r"found \['text'\]: tokenise the rows"),
        (dict(init_lora_weights="corda"), [FLAT], ValueError, r"must be \[B, T\] alike, found .*\[1, 2, 3\]"),
        (dict(init_lora_weights=True), data(), ValueError, 'by init_lora_weights="eva" and "corda" only, found True'),
        (
            dict(init_lora_weights="corda", corda_config=dict(corda_method="xpm")),
            data(),
            ValueError,
            "corda_method 'xpm' is not one of ipm, kpm",
        ),
        (
            dict(init_lora_weights="corda", corda_config=dict(cache_file="x")),
            data(),
            ValueError,
            "cache_file is a pickle of PEFT's",
        ),
        (
            dict(init_lora_weights="corda", corda_config=dict(mode="kpm")),
            data(),
            ValueError,
            "corda_config has cache_file, .*, found mode",
        ),
        (
            dict(init_lora_weights="eva", eva_config=dict(rho=0.5)),
            data(),
            ValueError,
            "rho must be at least 1, found 0.5",
        ),
        (
            dict(init_lora_weights="eva", eva_config=dict(tau=1.5)),
            data(),
            ValueError,
            r"tau must lie in \(0, 1\], found 1.5",
        ),
        (dict(eva_config=dict(rho=2)), None, ValueError, r'needs init_lora_weights="eva", found True'),
        (
            dict(init_lora_weights="eva", corda_config=dict(corda_method="ipm")),
            data(),
            ValueError,
            "needs init_lora_weights=\"corda\", found 'eva'",
        ),
        (
            dict(init_lora_weights="eva"),
            data(batch=1, length=7, masked=False),
            ValueError,
            "no batch has the 8 tokens that count, .* largest has 7",
        ),
        (dict(init_lora_weights="corda", r=50), data(), ValueError, "takes as many directions .* as the rank says, 50"),
    ],
    ids=lambda value: "iterator" if isinstance(value, Iterator) else str(value),
)
def test_what_does_not_work(options, dataset, error, message, checkpoint):
    model = load_folder(checkpoint)
    with pytest.raises(error, match=message):
        config = LoraConfig(**{"target_modules": ["q_proj", "up_proj"], "r": 4, **options})
        lora.add_adapters(model, config, jax.random.key(0), dataset)
    assert not lora.adapters(model)


def test_corda_wants_plain_weights_and_finite_inputs(checkpoint):
    with pytest.raises(TypeError, match="init_lora_weights='corda' needs the weights in float32, float16 or bfloat16"):
        fresh(checkpoint, data(), QuantConfig(), init_lora_weights="corda")
    model = load_folder(checkpoint)
    norm = model.model.layers[0].period[0].input_layernorm.weight
    norm.set_value(jnp.zeros_like(norm.get_value()))
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights="corda")
    with pytest.raises(ValueError, match="q_proj reads it: the mean variance of the inputs is nan"):
        lora.add_adapters(model, config, jax.random.key(0), data())


def test_directions_that_do_not_settle(checkpoint, monkeypatch):
    monkeypatch.setattr("jaxlora.data_starts._PASSES", 2)
    with pytest.raises(ValueError, match="have not settled after 2 passes: pass more data, or a lower tau"):
        fresh(checkpoint, data(count=2), init_lora_weights="eva", eva_config=dict(tau=1.0), target_modules=["q_proj"])


def test_settings_that_change_nothing_are_said():
    with pytest.warns(UserWarning, match="use_float16_for_covariance, verbose change nothing here"):
        LoraConfig(init_lora_weights="corda", corda_config=dict(verbose=True, use_float16_for_covariance=True))
