"""Two adapters on one frozen model, trained at once, with a loss and an optimizer of our own.

    python examples/research.py                                     # a tiny random model: seconds on a CPU
    python examples/research.py --model path/to/a/checkpoint        # the same on a real one

A model with adapters is three things: a graph definition (static), `trainable` (the adapters) and `frozen` (the rest).

    graphdef, trainable, frozen = jaxlora.partition(model)
    logits = nnx.merge(graphdef, trainable, frozen)(input_ids)

The last two are pytrees of arrays, so everything that JAX does with a function of arrays, it does with a model:

  jax.grad    with respect to `trainable`: no gradient of a frozen weight is ever computed, quantised or not.
  jax.jit     of the whole step. `frozen` is an argument, not a constant, so the program does not hold a copy of it.
  jax.vmap    over a stack of adapters: K adapters train on K tasks in one program, over one copy of the frozen weights.
  tree.map    to make new adapters of old ones. A zero adapter is the base model itself, which the loss below uses.

The task: language number k counts in steps of +1 or -1 (modulo n). The base model speaks neither. The loss is cross
entropy plus `beta` times the divergence from the base model, which keeps an adapter from straying further than it must:

    loss = CE(p_adapted, next token) + beta * KL(p_adapted || p_base)
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxlora


def tiny_model() -> jaxlora.LanguageModel:
    """A Llama of two layers with random weights."""
    config = jaxlora.ModelConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope=jaxlora.RopeConfig(),
        layer_types=("full_attention",) * 2,
    )
    model = jaxlora.LanguageModel(config, rngs=nnx.Rngs(0))
    head = model.lm_head.weight
    head.set_value(10 * head.get_value())  # fresh heads are too small to be sure of anything, and this one stays frozen
    return model


def counting(key: jax.Array, step: jax.Array, batch: int, length: int, n: int) -> jax.Array:
    """Sentences [batch, length] of the language that counts by `step`, modulo n."""
    start = jax.random.randint(key, (batch, 1), 0, n)
    return (start + step * jnp.arange(length)) % n


parser = argparse.ArgumentParser(description="Train two adapters at once on one frozen model.")
parser.add_argument("--model", help="checkpoint folder, .gguf file or Hugging Face id; a tiny random model if left out")
parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: %(default)s)")
parser.add_argument("--batch", type=int, default=8, help="sentences per step and language (default: %(default)s)")
parser.add_argument("--beta", type=float, default=0.01, help="weight of the divergence (default: %(default)s)")
parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default: %(default)s)")
parser.add_argument("--learning-rate", type=float, default=1e-2, help="its peak (default: %(default)s)")
args = parser.parse_args()

LENGTH, NUMBERS = 24, 16
LANGUAGES = jnp.array([+1, -1])

# The model, and its three parts

if args.model:
    model, _ = jaxlora.FastLanguageModel.from_pretrained(args.model)
else:
    model = tiny_model()
model = jaxlora.FastLanguageModel.get_peft_model(
    model, r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", use_gradient_checkpointing=False
)
model.print_trainable_parameters()
graphdef, trainable, frozen = jaxlora.partition(model)

# The loss: a function of pytrees


def logits_of(trainable, frozen, ids):
    return nnx.merge(graphdef, trainable, frozen)(ids)


def loss(trainable, frozen, ids):
    """Mean over tokens of cross entropy + beta * KL to the base model; and the cross entropy alone."""
    log_p = jax.nn.log_softmax(logits_of(trainable, frozen, ids[:, :-1]))
    base = jax.tree.map(jnp.zeros_like, trainable)  # B = 0: the adapters add nothing
    log_q = jax.lax.stop_gradient(jax.nn.log_softmax(logits_of(base, frozen, ids[:, :-1])))
    cross_entropy = -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=-1).mean()
    divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    return cross_entropy + args.beta * divergence, cross_entropy


# The optimizer: any optax chain. It sees the adapters only, so its state is as small as they are.

optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b2=0.99),
    optax.scale_by_learning_rate(optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, 10, args.steps)),
)


def step(trainable, opt_state, frozen, key, language):
    ids = counting(key, language, args.batch, LENGTH, NUMBERS)
    gradients, cross_entropy = jax.grad(loss, has_aux=True)(trainable, frozen, ids)
    updates, opt_state = optimizer.update(gradients, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, cross_entropy


# One program for all languages: the adapters and optimizer states have a leading axis [languages], `frozen` has none.

adapters = jax.tree.map(lambda x: jnp.stack([x] * len(LANGUAGES)), trainable)
opt_states = jax.vmap(optimizer.init)(adapters)
step_all = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None, 0)), donate_argnums=(0, 1))

for i in range(args.steps):
    key = jax.random.fold_in(jax.random.key(1), i)
    adapters, opt_states, losses = step_all(adapters, opt_states, frozen, key, LANGUAGES)
    if i % 10 == 0 or i == args.steps - 1:
        print(
            f"step {i:4d}   "
            + "   ".join(f"by {s:+d}: {x:.3f}" for s, x in zip(LANGUAGES.tolist(), losses, strict=True))
        )

# Every adapter on every language: each continues its own, and gets the other's wrong.


@jax.jit
def accuracy(trainable, frozen, language):
    """Share of right next tokens in new sentences."""
    ids = counting(jax.random.key(2), language, 8, LENGTH, NUMBERS)
    return (logits_of(trainable, frozen, ids[:, :-1]).argmax(-1) == ids[:, 1:]).mean()


on_every_language = jax.vmap(accuracy, in_axes=(None, None, 0))
table = jax.vmap(on_every_language, in_axes=(0, None, None))(adapters, frozen, LANGUAGES)
print("accuracy of adapter (row) on language (column):")
for row in table:
    print("   ".join(f"{x:6.1%}" for x in row.tolist()))
