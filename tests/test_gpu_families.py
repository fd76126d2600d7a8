"""Every kind of layer on a GPU: losses and the adapters' gradients of tiny models beside a CPU's."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from helpers import LINEARS, TINY, random_ids, randomise_adapters

from jaxlora import lora
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.huggingface import model_config
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM

pytestmark = pytest.mark.gpu


def model_of(name, dtype, quant_config=None):
    """A row of `TINY`, drawn on the CPU, so that devices do not differ by what they draw."""
    model_type, fields = TINY[name]
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(fields)).to_dict()
    with jax.default_device(jax.devices("cpu")[0]):
        model = CausalLM(model_config(config), dtype=dtype, quant_config=quant_config, rngs=nnx.Rngs(0))
        lora.add_adapters(model, LoraConfig(r=4, target_modules=LINEARS), jax.random.key(1))
        randomise_adapters(model)
    return model


def gradients(model, device):
    """(loss, the adapters' gradients in one vector), float64, of two rows of two documents each, one padded."""
    graphdef, trainable, frozen = lora.partition(model)
    ids = random_ids(2, 32)
    segments = np.repeat([[1, 2], [1, 0]], 16, axis=1).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.where(segments > 0, ids, -100), "segment_ids": segments}

    @jax.jit
    def f(trainable, frozen, batch):
        def loss(trainable):
            total, weight, _ = causal_lm_loss(nnx.merge(graphdef, trainable, frozen), batch)
            return total / weight

        return jax.value_and_grad(loss)(trainable)

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        loss, grads = f(*jax.device_put((trainable, frozen, batch), device))
    return float(loss), np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(grads)])


# A row for each kind of layer that others have not; all of them would take half an hour to compile.
NAMES = ("gemma4_text", "mixtral", "qwen2_moe", "gpt_oss", "falcon_h1", "qwen3_5_text", "granitemoe", "cohere")


@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_computes_what_the_cpu_does(name):
    """In float32 the same losses and gradients. In bfloat16 with NF4 weights it runs, and no more is shown: the loss of
    a random model is that of any other, and quantising moves these gradients by up to a half."""
    cpu, gpu = jax.devices("cpu")[0], jax.devices()[0]
    exact = model_of(name, jnp.float32)
    (wanted_loss, wanted), (loss, found) = gradients(exact, cpu), gradients(exact, gpu)
    assert abs(loss - wanted_loss) < 1e-4 * wanted_loss
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)

    _, found = gradients(model_of(name, jnp.bfloat16, QuantConfig()), gpu)
    assert np.isfinite(found).all() and np.any(found != 0.0)
