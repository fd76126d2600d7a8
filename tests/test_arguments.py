"""What the arguments of `from_pretrained` mean that are not about files, modes or windows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from helpers import make_checkpoint, random_ids, randomise_adapters, relative_error

from jaxlora import FastLanguageModel, QuantConfig, sharding
from jaxlora.converters.huggingface import CheckpointError
from jaxlora.lora import partition
from jaxlora.loss import causal_lm_loss
from jaxlora.modes import Mode, choose_mode, read_quantization_config
from jaxlora.offload import pinned_host, take_rows
from jaxlora.optimizer import make_optimizer
from jaxlora.remat import POLICIES, mlp_tile
from jaxlora.train import TrainState, make_train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")

MODES = dict(load_in_4bit=None, load_in_8bit=False, load_in_16bit=False, load_in_fp8=False, full_finetuning=False)


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", "load_in_16bit": True, **options})[0]


def batch():
    ids = jnp.asarray(random_ids(4, 12))
    return {"input_ids": ids, "labels": ids}


def with_adapters(model):
    FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "down_proj"], use_gradient_checkpointing=False
    )
    randomise_adapters(model)
    return model


def after_two_steps(model):
    """The loss of the second of two steps, and the adapters after it."""
    graphdef, trainable, frozen = partition(model)
    optimizer = make_optimizer("adamw", lambda step: 1e-2)
    state, step = TrainState.create(trainable, optimizer), make_train_step(graphdef, optimizer)
    for _ in range(2):
        state, metrics = step(state, frozen, batch())
    return float(metrics["loss"]), jax.tree.leaves(state.trainable)


# ---- Names, code, towers ---------------------------------------------------------------------------------------------


def test_an_argument_that_there_is_none_of(tmp_path):
    with pytest.raises(
        TypeError, match="no argument 'attn_implementation', 'num_labels', and passes nothing on.*dtype"
    ):
        FastLanguageModel.from_pretrained(tmp_path, attn_implementation="sdpa", num_labels=2)


@pytest.mark.parametrize("exact", [False, True])
def test_no_name_is_mapped_to_another(exact, tmp_path):
    make_checkpoint("llama", tmp_path / "Tiny-unsloth-bnb-4bit")
    model = load(tmp_path / "Tiny-unsloth-bnb-4bit", use_exact_model_name=exact)
    assert model.name_or_path == str(tmp_path / "Tiny-unsloth-bnb-4bit")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_checkpoint_is_never_run(trust, tmp_path):
    make_checkpoint("llama", tmp_path)
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('this was run')")
    auto_map = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    edit_config(tmp_path, model_type="mine", auto_map=auto_map)
    with pytest.raises(
        CheckpointError, match="'mine' is code of its own .auto_map., which is never run here, whatever"
    ):
        load(tmp_path, trust_remote_code=trust)
    edit_config(tmp_path, model_type="llama")  # a family that is built in, whatever code lies beside it
    if trust:
        with pytest.warns(
            UserWarning, match="trust_remote_code=True has no effect: no code of a checkpoint is ever run"
        ):
            load(tmp_path, trust_remote_code=True)
    else:
        load(tmp_path)


def test_a_vision_tower_is_left_alone_and_this_is_said(tmp_path):
    make_checkpoint("llama", tmp_path)
    edit_config(tmp_path, vision_config={"hidden_size": 8})
    with pytest.warns(
        UserWarning, match="its vision tower is not loaded, only its language model; text_only=True says"
    ):
        load(tmp_path)
    load(tmp_path, text_only=True)


# ---- quantization_config ---------------------------------------------------------------------------------------------

FOUR_BITS = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize(
    "config, expected",
    [
        (transformers.BitsAndBytesConfig(**FOUR_BITS), ("nf4", False, "float32")),
        (
            transformers.BitsAndBytesConfig(
                **FOUR_BITS, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16",
                llm_int8_skip_modules=["lm_head", "router"],
            ),
            ("nf4", True, "bfloat16"),
        ),
        (FOUR_BITS, ("nf4", False, None)),
        (transformers.BitsAndBytesConfig(load_in_8bit=True), ("int8", None, None)),
        (transformers.FineGrainedFP8Config(modules_to_not_convert=["lm_head"]), ("fp8_block", None, None)),
        (transformers.FbgemmFp8Config(), ("fp8", None, None)),
        (QuantConfig(scheme="int8"), ("int8", True, None)),
    ],
)  # fmt: skip
def test_a_quantization_config(config, expected):
    mode = read_quantization_config(config)
    assert (mode.scheme, mode.double_quant, mode.compute_dtype) == expected
    assert mode.quant_config == QuantConfig(scheme=expected[0], double_quant=expected[1] is not False)


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"load_in_4bit": True}, ValueError, "bnb_4bit_quant_type is 'fp4'; supported is 'nf4'"),
        ({"quant_method": "gptq"}, ValueError, "quant_method is 'gptq' with load_in_4bit=False and load_in_8bit=False"),
        ({**FOUR_BITS, "load_in_8bit": True}, ValueError, "with load_in_4bit=True and load_in_8bit=True"),
        ({**FOUR_BITS, "llm_int8_skip_modules": ["lm_head", "o_proj"]}, ValueError, r"it leaves \['o_proj'\] unquant"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, ValueError, r"weight_block_size is \[64, 64\]"),
        ({"quant_method": "fp8", "dequantize": True}, ValueError, "dequantize is True; supported is False"),
        ("nf4", TypeError, "quantization_config is 'nf4'; it should be a QuantConfig, one of transformers', or a dict"),
    ],
)
def test_a_quantization_config_that_asks_for_something_else(config, error, message):
    with pytest.raises(error, match=message):
        read_quantization_config(config)


def test_a_quantization_config_beside_the_other_arguments():
    assert choose_mode(**{**MODES, "load_in_4bit": True}, quantization_config=FOUR_BITS).scheme == "nf4"
    for other in ("load_in_8bit", "load_in_16bit", "full_finetuning"):
        with pytest.raises(ValueError, match=f"{other}=True and a quantization_config that says nf4 are both given"):
            choose_mode(**{**MODES, other: True}, quantization_config=FOUR_BITS)
    nested, plain = QuantConfig(), QuantConfig(double_quant=False)
    assert Mode("nf4", "load_in_4bit=True").agrees(plain) and Mode("nf4", "").agrees(plain)
    assert not Mode("nf4", "quantization_config", True).agrees(plain)
    assert not Mode("int8", "load_in_8bit=True").agrees(nested)


def test_loading_with_a_quantization_config(tmp_path):
    make_checkpoint("llama", tmp_path)
    config = transformers.BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype="bfloat16")
    model, _ = FastLanguageModel.from_pretrained(tmp_path, quantization_config=config)
    weight = model.model.layers[0].period[0].mlp.up_proj.weight.get_value()
    assert (weight.scheme, weight.nested_absmax, model.dtype) == ("nf4", None, jnp.bfloat16)
    same = load(tmp_path, load_in_16bit=False, quantization_config=QuantConfig(), dtype="float32")
    default = load(tmp_path, load_in_16bit=False)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(default))


# ---- Where weights lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "auto", "sequential"])
def test_the_first_device(device_map, tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load(tmp_path, device_map=device_map)
    assert {leaf.device for leaf in jax.tree.leaves(nnx.state(model))} == {jax.devices()[0]}


@pytest.mark.parametrize("device_map", ["balanced", "cuda:0", {"": 0}, 0])
def test_layers_are_not_dealt_out_to_devices(device_map, tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(
        ValueError, match="is not a mesh, None.*Pass device_map=jaxlora.sharding.make_mesh.fsdp=4., say"
    ):
        load(tmp_path, device_map=device_map)


def test_a_mesh_gets_its_shards_and_trains_alike(tmp_path):
    make_checkpoint("llama", tmp_path, vocab_size=96, hidden_size=48, intermediate_size=96)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    model = load(tmp_path, device_map=mesh)
    leaves = jax.tree.leaves(nnx.state(model))
    for leaf, place in zip(leaves, jax.tree.leaves(sharding.shardings(model, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) < sum(leaf.nbytes for leaf in leaves) / 4
    loss, adapters = after_two_steps(with_adapters(model))
    expected_loss, expected = after_two_steps(with_adapters(load(tmp_path)))
    assert abs(loss - expected_loss) < 1e-5
    for ours, theirs in zip(adapters, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-3


# ---- offload_embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_table_in_host_memory(dtype, key):
    table = jax.random.normal(key, (7, 5)).astype(dtype)
    ids = jnp.asarray([[0, 6, 3], [3, 3, 1]], jnp.int32)
    hosted = jax.device_put(table, pinned_host())
    for function in (take_rows, jax.jit(take_rows)):
        rows = function(hosted, ids)
        assert rows.sharding.memory_kind == "device"
        assert np.array_equal(rows, table[ids])
        assert np.isnan(np.asarray(function(hosted, jnp.asarray([7], jnp.int32)), np.float32)).all()


# Falcon's table has another name; Gemma 4's is the head, too, and what it has of each layer goes.
@pytest.mark.parametrize("name", ["llama", "falcon-40b", "gemma4_text"])
def test_an_embedding_in_host_memory(name, tmp_path):
    make_checkpoint(name, tmp_path / "base")
    model, plain = (load(tmp_path / "base", offload_embedding=flag, load_in_16bit=False) for flag in (True, False))
    hosted = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.sharding.memory_kind == "pinned_host"]
    table = model.model.embed_tokens_per_layer or model.model.embed_tokens
    assert hosted == [table.weight.get_value()]
    ids = random_ids(2, 9)
    assert np.array_equal(model(jnp.asarray(ids)), plain(jnp.asarray(ids)))
    if name != "falcon-40b":
        assert np.array_equal(model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))
        found, expected = after_two_steps(with_adapters(model)), after_two_steps(with_adapters(plain))
        assert found[0] == expected[0]
        jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
        assert table.weight.get_value() is hosted[0]


def test_a_model_with_its_embedding_in_host_memory_is_exported(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    model = with_adapters(load(tmp_path / "base", offload_embedding=True))
    report = model.save_pretrained_merged(tmp_path / "merged")
    assert report.export_error < 1e-5 * report.largest_logit
    ids = jnp.asarray(random_ids(1, 9))
    assert relative_error(load(tmp_path / "merged")(ids), model(ids)) < 1e-5


def test_an_embedding_that_cannot_be_offloaded(tmp_path):
    make_checkpoint("llama-tied", tmp_path / "tied")
    with pytest.warns(UserWarning, match="offload_embedding=True has no effect: the embedding is also the head"):
        model = load(tmp_path / "tied", offload_embedding=True)
    assert model.model.embed_tokens.weight.get_value().sharding.memory_kind == "device"
    make_checkpoint("llama", tmp_path / "base")
    with pytest.raises(ValueError, match="keeps the embedding frozen, and full_finetuning=True trains it"):
        load(tmp_path / "base", offload_embedding=True, load_in_16bit=False, full_finetuning=True)
    with pytest.raises(ValueError, match="offload_embedding=True is for one device, and device_map is a mesh"):
        load(tmp_path / "base", offload_embedding=True, device_map=sharding.make_mesh(fsdp=2))


def test_an_embedding_in_host_memory_takes_an_adapter_and_nothing_more(tmp_path):
    make_checkpoint("llama", tmp_path)
    hosted, plain = (load(tmp_path, offload_embedding=flag) for flag in (True, False))
    for options in ({"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"], "use_dora": True}):
        with pytest.raises(ValueError, match="the embedding is in host memory, and only rows of it reach the device"):
            FastLanguageModel.get_peft_model(hosted, r=4, **options)
    for model in (hosted, plain):
        FastLanguageModel.get_peft_model(model, r=4, target_modules=["embed_tokens"])
        randomise_adapters(model)
    ids = jnp.asarray(random_ids(1, 9))
    assert np.array_equal(hosted(ids), plain(ids))


# ---- unsloth_tiled_mlp -----------------------------------------------------------------------------------------------


def test_tiles_under_every_policy():
    for name, policy in POLICIES.items():
        assert mlp_tile(name) == policy.mlp_tile and mlp_tile(name, True) is not None


@pytest.mark.parametrize("policy", ["none", "projections"])
def test_a_tiled_mlp_computes_the_same_in_less_memory(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.remat._ASKED_TILE", 64)
    # Wide and short: what the MLP keeps is most of what there is.
    make_checkpoint("llama", tmp_path, hidden_size=24, intermediate_size=1024, num_hidden_layers=2)
    ids = jnp.asarray(random_ids(8, 64))
    rows = {"input_ids": ids, "labels": ids}
    results = {}
    for tiled in (False, True):
        model = load(tmp_path, unsloth_tiled_mlp=tiled, use_gradient_checkpointing=policy)
        FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=policy)
        randomise_adapters(model)
        assert model.tiled_mlp is tiled
        graphdef, trainable, frozen = partition(model)

        def loss(trainable, frozen, graphdef=graphdef):
            return causal_lm_loss(nnx.merge(graphdef, trainable, frozen), rows)[0]

        compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile()
        results[tiled] = jax.tree.leaves(compiled(trainable, frozen)), compiled.memory_analysis().temp_size_in_bytes
    for ours, theirs in zip(results[True][0], results[False][0], strict=True):
        assert relative_error(ours, theirs) < 1e-4
    assert results[False][1] - results[True][1] > 2 * ids.size * 1024 * 4  # gate and up of a layer


# ---- for_inference, for_training -------------------------------------------------------------------------------------


def test_nothing_has_to_be_switched(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = with_adapters(load(tmp_path))
    ids = random_ids(1, 6)
    before = np.asarray(model.generate(ids, max_new_tokens=3))
    assert FastLanguageModel.for_inference(model) is model
    assert np.array_equal(model.generate(ids, max_new_tokens=3), before)
    assert FastLanguageModel.for_training(model) is model and model.remat_policy == "none"
    FastLanguageModel.for_training(model, use_gradient_checkpointing="unsloth")
    assert model.remat_policy == "offload"
    with pytest.raises(ValueError, match="use_gradient_checkpointing='all' is not one of"):
        FastLanguageModel.for_training(model, use_gradient_checkpointing="all")
