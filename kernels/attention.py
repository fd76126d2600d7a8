"""Causal attention over grouped heads, documents and windows:  out = softmax(q k^T * scale + mask) v.

Layout: q [B, T, N, H]; k, v [B, S, K, H], with N a multiple of K: query head n reads key head n // (N / K). Query t
stands at index `offset + t` of the keys, the offset one for all rows or one for each, [B]. It sees key s when
s <= offset + t, when they carry the same segment id, and, with a window w, when offset + t - s < w. The softmax is
float32. With a softcap c the scores, scaled and before the mask, become c * tanh(scores / c) (Gemma 2,
arXiv:2408.00118). A key bias [B, N, S] is added to them after that
(ALiBi, arXiv:2108.12409). Sinks [N] are the score of one more key for each head, whose value is zero: a query may
attend to nothing (gpt-oss, arXiv:2508.10925).

The forms in jnp mark their result "attention_output" for `jax.checkpoint`, and so do cuDNN's rounds; else cuDNN's is
kept by its primitive's name.

cuDNN knows no sinks. It returns o, attention without them, and l, the logsumexp of a query's scores. With the sink s of
the head

    l' = logaddexp(l, s)        p' = exp(score - l')        y = sum p' v = o sigmoid(l - s)

and with D = sum of dy y over the head's entries, d(score) = p' (dP - D). That is what the flash backward pass computes
of dy when it is given l' as its logsumexp, of which it makes p, and y as its output, of which it makes D
(FlashAttention-2, arXiv:2307.08691, section 3.1.2). The sinks get ds = -sum of exp(s - l') D, and exp(s - l') is
sigmoid(s - l).

Three forms:

- `reference` keeps the [B, N, T, S] scores. It is the specification, and serves short sequences and decoding.
- `chunked` takes the queries a chunk at a time and computes each chunk again for its gradient: [B, N, chunk, S] at
once.
- `cudnn` is NVIDIA's flash kernel, which keeps no scores at all: 16-bit, T = S, offset 0. jax.nn offers it without
  documents (what ignores them leaks from one to the next), so packed rows go through the function beneath it, with the
  length and the start of every document. It wants a fixed number of places for documents, and memory for each; where a
  row has more than `MAX_SEGMENTS`, which is decided on the device, so many at a time go through it, and the backward
  pass runs the forward one again.

Under `--xla_gpu_deterministic_ops` XLA builds one graph of cuDNN for backward passes that are the same, and then finds
it for the first of them alone: the program ends with "raw_hash_map<>::at" (openxla/xla pull request 46500, open on
2026-11-27). So each call is handed a seed of its own, of a dropout that there is not, by which they differ, and
`full_determinism` has layers that are alike in loops.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

MAX_SEGMENTS = 32
# jax before it counted the start of a document's keys in heads of queries (jax-ml/jax pull request 39521), which is the
# same only where there are as many key heads.
FIRST_WITH_KEY_OFFSETS = (0, 11, 1)


def attention_mask(
    query_segments: Int[Array, "b t"] | None,
    key_segments: Int[Array, "b s"] | None,
    lengths: tuple[int, int],
    offset: int | Int[Array, "*b"] = 0,
    window: int | None = None,
) -> Bool[Array, "b_or_1 t s"]:
    """Which query sees which key; `lengths` is (T, S)."""
    query = jnp.arange(lengths[0], dtype=jnp.int32)[:, None] + jnp.asarray(offset)[..., None, None]
    key = jnp.arange(lengths[1], dtype=jnp.int32)
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    mask = mask.reshape(-1, *lengths)
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask


def attention_reference(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s kv h"],
    v: Float[Array, "b s kv h"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    offset: int | Int[Array, "*b"] = 0,
) -> Float[Array, "b t n h"]:
    """The formula of this file's header, in plain jnp. Every query must see at least itself."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if key_bias is not None:
        scores = scores + key_bias.reshape(b, kv, n // kv, 1, -1)
    mask = attention_mask(query_segments, key_segments, (t, k.shape[1]), offset, window)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv, n // kv, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return checkpoint_name(out.reshape(b, t, n, h).astype(q.dtype), "attention_output")


def attention_chunked(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s kv h"],
    v: Float[Array, "b s kv h"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    offset: int | Int[Array, "*b"] = 0,
    chunk: int = 512,
) -> Float[Array, "b t n h"]:
    """`attention_reference`, `chunk` queries at a time, none of whose scores outlive the chunk."""
    b, t, n, h = q.shape
    chunks = -(-t // chunk)
    padding = chunks * chunk - t
    segments = jnp.ones((b, t), jnp.int32) if query_segments is None else query_segments
    keys = jnp.ones((b, k.shape[1]), jnp.int32) if key_segments is None else key_segments
    rows = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(b, chunks, chunk, n, h).swapaxes(0, 1)
    marks = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge").reshape(b, chunks, chunk).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(inputs):
        index, q, marks = inputs
        start = offset + index * chunk
        return attention_reference(
            q, k, v, scale=scale, window=window, softcap=softcap, key_bias=key_bias, sinks=sinks,
            query_segments=marks, key_segments=keys, offset=start,
        )  # fmt: skip

    out = jax.lax.map(one_chunk, (jnp.arange(chunks, dtype=jnp.int32), rows, marks))
    return checkpoint_name(out.swapaxes(0, 1).reshape(b, chunks * chunk, n, h)[:, :t], "attention_output")


def attention_cudnn(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s kv h"],
    v: Float[Array, "b s kv h"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    offset: int | Int[Array, "*b"] = 0,
    call: int = 0,
) -> Float[Array, "b t n h"]:
    """cuDNN's flash attention. `call`: another for each call in a program, see the head of this file.

    Raises:
        NotImplementedError: float32, a head dim that is no multiple of 8 or above 256, a softcap, a key bias, or
            queries that are not the keys' own tokens (decoding).
    """
    if softcap is not None or key_bias is not None:
        raise NotImplementedError("cuDNN attention here has no softcap on the scores and no bias of the keys")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 and float16, found {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise NotImplementedError(f"cuDNN attention takes head dims in multiples of 8 up to 256, found {q.shape[-1]}")
    if not isinstance(offset, int) or offset != 0 or q.shape[1] != k.shape[1]:
        raise NotImplementedError("cuDNN attention here takes queries that stand at the keys' own places")
    whole, in_rounds = (_How(scale, window, seed) for seed in (2 * call, 2 * call + 1))
    if query_segments is None:
        return _cudnn_whole(whole, q, k, v, sinks)
    document = _document_index(query_segments)
    return jax.lax.cond(
        jnp.max(document) <= MAX_SEGMENTS,
        lambda: _cudnn_packed(whole, q, k, v, sinks, document),
        lambda: checkpoint_name(_cudnn_in_rounds(in_rounds, q, k, v, sinks, document), "attention_output"),
    )


class _How(NamedTuple):
    """What is known of a call when it is traced. seed: by which it differs from others, see the head of this file."""

    scale: float
    window: int | None
    seed: int


def _document_index(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """1, 2, ... for the runs of equal segment ids in a row, 0 where the id is 0 (padding)."""
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    starts = (segments != before) & (segments != 0)
    return jnp.where(segments != 0, jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)


class _Documents(NamedTuple):
    """Where the documents of each row are. index: as `_document_index`. lengths, starts: -1 where there is none."""

    index: Int[Array, "b t"]
    lengths: Int[Array, "b documents"]
    starts: Int[Array, "b documents_and_one"]


def _cudnn_whole(how: _How, q, k, v, sinks):
    """Attention of rows that are one document each."""
    if sinks is not None:
        return _cudnn_with_sinks(how, q, k, v, sinks, None)
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    return dot_product_attention(
        q,
        k,
        v,
        scale=how.scale,
        mask_type=MaskType.CAUSAL,
        seed=how.seed,
        sliding_window_length=how.window,
    )


def _cudnn_packed(how: _How, q, k, v, sinks, document):
    """Attention within documents, whose index is at most `MAX_SEGMENTS`; zeros where it is 0."""
    # Private, because jax.nn has no argument for packed rows (jax-ml/jax pull request 25812 added it one level below),
    # and none for a seed.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    real = (document > 0)[:, :, None, None]
    # Padding belongs to no document: cuDNN neither reads nor writes it, so both directions are masked here.
    q, k, v = (jnp.where(real, x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    places = jnp.arange(1, MAX_SEGMENTS + 1, dtype=jnp.int32)
    member = document[:, None, :] == places[None, :, None]  # [B, MAX_SEGMENTS, T]
    lengths = jnp.sum(member, axis=2, dtype=jnp.int32)
    exists = lengths > 0
    lengths = jnp.where(exists, lengths, -1)
    starts = jnp.where(exists, jnp.argmax(member, axis=2).astype(jnp.int32), -1)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    if jax.__version_info__ < FIRST_WITH_KEY_OFFSETS:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    if sinks is not None:
        return _cudnn_with_sinks(how, q, k, v, sinks, _Documents(document, lengths, starts))
    out = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=how.scale,
        mask_type=MaskType.PADDING_CAUSAL,
        seed=how.seed,
        sliding_window_length=how.window,
    )
    return jnp.where(real, out, jnp.zeros((), out.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn_in_rounds(how, q, k, v, sinks, document):
    """`_cudnn_packed` for any number of documents, `MAX_SEGMENTS` of each row at a time. No two rounds make the same
    token's, so nothing is rounded by adding them up."""

    def with_round(i, y):
        return y + _cudnn_packed(how, q, k, v, sinks, _of_round(document, i))

    return jax.lax.fori_loop(0, _rounds(document), with_round, jnp.zeros_like(q))


def _in_rounds_forward(how, *given):
    return _cudnn_in_rounds(how, *given), given


def _in_rounds_backward(how, given, dy):
    *inputs, document = given

    def with_round(i, sums):
        attend = lambda *inputs: _cudnn_packed(how, *inputs, _of_round(document, i))
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, jax.vjp(attend, *inputs)[1](dy))

    # A token gets its gradients in one round, a sink something in each.
    wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), inputs[3])
    start = (*(jnp.zeros_like(x) for x in inputs[:3]), wide)
    *of_tokens, of_sinks = jax.lax.fori_loop(0, _rounds(document), with_round, start)
    return *of_tokens, jax.tree.map(lambda total, x: total.astype(x.dtype), of_sinks, inputs[3]), None


_cudnn_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _rounds(document: Int[Array, "b t"]) -> Int[Array, ""]:
    return -(-jnp.max(document) // MAX_SEGMENTS)


def _of_round(document: Int[Array, "b t"], i: Any) -> Int[Array, "b t"]:
    """The documents of round i, numbered from 1 on; 0 for others."""
    within = document - i * MAX_SEGMENTS
    return jnp.where((within > 0) & (within <= MAX_SEGMENTS), within, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn_with_sinks(how, q, k, v, sinks, documents):
    """cuDNN's attention with sinks; `documents` of packed rows, whose padding gets zeros, else None."""
    return _with_sinks_forward(how, q, k, v, sinks, documents)[0]


def _with_sinks_forward(how, q, k, v, sinks, documents):
    out, statistics, others = _flash_forward(how, q, k, v, documents)
    share = jax.nn.sigmoid(_of_tokens(statistics, documents) - sinks.astype(jnp.float32))
    y = _masked(out.astype(jnp.float32) * share[..., None], documents).astype(out.dtype)
    return y, (others, statistics, y, sinks, documents)


def _with_sinks_backward(how, residuals, dy):
    others, statistics, y, sinks, documents = residuals
    sink = sinks.astype(jnp.float32)
    dy = _masked(dy, documents)
    dq, dk, dv = _flash_backward(how, others, jnp.logaddexp(statistics, sink[:, None]), y, dy)
    # Nobody reads the rest where sinks are frozen, and XLA leaves it out.
    inner = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=3)
    of_sink = jax.nn.sigmoid(sink - _of_tokens(statistics, documents))
    return dq, dk, dv, -jnp.sum(_masked(of_sink * inner, documents), axis=(0, 1)).astype(sinks.dtype), None


_cudnn_with_sinks.defvjp(_with_sinks_forward, _with_sinks_backward)


def _masked(x: Float[Array, "b t *rest"], documents: _Documents | None) -> Float[Array, "b t *rest"]:
    """x, and zeros for padding, where cuDNN leaves what was in memory: NaN, perhaps, so it is never multiplied."""
    if documents is None:
        return x
    return jnp.where((documents.index > 0).reshape(x.shape[:2] + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def _flash_forward(how, q, k, v, documents) -> tuple[Array, Array, tuple]:
    """cuDNN's output, its logsumexp, and what else its backward pass is given.

    The rule of jax's custom vjp is called, and not the function that has it: a policy of `jax.checkpoint` does not look
    into a custom vjp within a custom vjp, and would not find the primitive whose results it is to keep.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    none = jnp.zeros(0, q.dtype)
    lengths, starts = (none, none) if documents is None else documents[1:]
    operands = q, k, v, none, lengths, lengths, starts, starts, none, none
    options = dict(_flash_options(how, documents is not None), return_residual=True)
    (out, statistics), residuals = _with_known(cudnn._dot_product_attention_fwd_rule, *operands, **options)
    return out, statistics, residuals[:-2]


def _flash_backward(how, others, statistics, out, d_out) -> tuple[Array, Array, Array]:
    """cuDNN's gradients of q, k and v, for any logsumexp and output that it is handed."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    options = dict(_flash_options(how, others[4].size > 0), return_residual=False)
    residuals = *others, statistics, out
    return _with_known(cudnn._dot_product_attention_bwd_rule, res=residuals, grad_output=d_out, **options)[:3]


def _flash_options(how: _How, is_packed: bool) -> dict[str, Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return dict(
        scale=how.scale,
        seed=how.seed,
        dropout_rate=0.0,
        variadic_args=(False, False),  # no bias, and no gradient of one
        mask_type=cudnn.MaskType.PADDING_CAUSAL if is_packed else cudnn.MaskType.CAUSAL,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=how.window,
        cudnn_version=cudnn.check_cudnn_version(),
        is_training=True,
        score_mod_args=(),
        score_mod=None,
    )


def _with_known(rule: Callable, *args, **options) -> Any:
    """rule(*args, **options), without the options that jax's version of it does not have (0.12 has more than 0.11)."""
    known = inspect.signature(rule).parameters
    return rule(*args, **{name: value for name, value in options.items() if name in known})


def _of_tokens(statistics: Float[Array, "rows n t"], documents: _Documents | None) -> Float[Array, "b t n"]:
    """The logsumexp of each token. With documents, a row of the statistics is a document from its first token on."""
    if documents is None:
        return statistics.swapaxes(1, 2)

    def own(statistics, index, starts):
        counts = jnp.sum(starts >= 0, axis=1, dtype=jnp.int32)
        number = jnp.maximum(index - 1, 0)
        row = (jnp.cumsum(counts) - counts)[:, None] + number  # documents count on from row to row of the batch
        place = jnp.arange(index.shape[1], dtype=jnp.int32) - jnp.take_along_axis(starts, number, axis=1)
        heads = jnp.arange(statistics.shape[1], dtype=jnp.int32)[:, None]
        return statistics.at[row[:, None], heads, place[:, None]].get(mode="clip", wrap_negative_indices=False)

    # On a mesh each device runs cuDNN for its rows of the batch, and counts its documents: each gathers of its own.
    partitioned = custom_partitioning(own)

    def partition(mesh, avals, result):
        rows, heads, _ = (*avals[0].sharding.spec, None, None, None)[:3]
        place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        return mesh, own, place(rows, heads, None), (place(rows, heads, None), place(rows, None), place(rows, None))

    places = statistics.shape[0] // documents.index.shape[0]
    partitioned.def_partition(partition=partition, sharding_rule="(b m) n p, b t, b s -> b n t", m=places)
    return partitioned(statistics, documents.index, documents.starts).swapaxes(1, 2)
