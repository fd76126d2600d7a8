"""LoftQ beside PEFT's own, whose quantisation wants bitsandbytes on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from helpers import load_folder, make_checkpoint, random_ids  # noqa: E402 (which imports torch and PEFT)
from walk import save_peft  # noqa: E402

from jaxlora import lora, quant  # noqa: E402
from jaxlora.config import LoraConfig  # noqa: E402
from jaxlora.converters import peft as ours  # noqa: E402
from jaxlora.layers import Linear  # noqa: E402
from jaxlora.model import named_nodes  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder, **SHAPE)
    return folder


def options(bits, rounds):
    # alpha = r, because PEFT's start does not divide by the scaling.
    loftq_config = dict(loftq_bits=bits, loftq_iter=rounds)
    return dict(r=16, lora_alpha=16, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=loftq_config)


@pytest.mark.parametrize("bits, rounds", [(4, 1), (4, 4), (8, 1)])
def test_loftq_starts_as_near_the_weight_as_pefts(bits, rounds, checkpoint, tmp_path):
    """What LoftQ guarantees, for each weight W: Q + s B A is nearer to W than the best that quantising alone does, and
    here it is as near as PEFT's within 0.5%. After one round Q itself and the product B A are PEFT's too."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").to(DEVICE)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options(bits, rounds))).eval()
    exact, model = load_folder(checkpoint), load_folder(checkpoint)
    config = LoraConfig(**options(bits, rounds))
    lora.add_adapters(model, config, jax.random.key(0))
    weights = {x.name: x.node.weight.get_value() for x in named_nodes(exact, Linear)}
    for target in lora.adapters(model):
        for layer, name in enumerate(target.names()):
            weight = np.asarray(weights[target.name][layer], np.float64)
            held = np.asarray(lora.float_weight(model, target.node, layer), np.float64)
            delta = np.asarray(lora.delta_weight(target.node, layer), np.float64)
            module = theirs.get_submodule(f"base_model.model.{name}")
            their_held = module.base_layer.weight.detach().double().cpu().numpy()
            a, b = (module.get_submodule(part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
            their_delta = (b.double() @ a.double()).cpu().numpy() * module.scaling["default"]

            found, expected = (np.linalg.norm(weight - x) for x in (held + delta, their_held + their_delta))
            scheme = "nf4" if bits == 4 else "int8"
            quantised = quant.quantize(jnp.asarray(weight, jnp.float32), scheme=scheme, double_quant=False)
            alone = np.linalg.norm(weight - np.asarray(quant.dequantize(quantised, jnp.float32), np.float64))
            assert found <= 1.005 * expected and expected <= 1.005 * found, name
            assert found < 0.97 * alone, name
            if rounds == 1:
                np.testing.assert_allclose(held, their_held, atol=1e-6 * np.abs(weight).max(), err_msg=name)
                assert np.linalg.norm(delta - their_delta) < 1e-2 * np.linalg.norm(their_delta), name
    if rounds == 1:
        # PEFT's file here: the base is quantised in the same way again, so the logits are PEFT's.
        save_peft(theirs, tmp_path / "theirs")
        loaded = load_folder(checkpoint)
        ours.load_adapter(loaded, tmp_path / "theirs")
        ids = random_ids(2, 11)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids).long().to(DEVICE)).logits.float().cpu().numpy()
        with jax.default_matmul_precision("highest"):
            found = np.asarray(loaded(jnp.asarray(ids)))
        assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
