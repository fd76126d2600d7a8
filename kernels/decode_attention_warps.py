"""The Triton function of `decode_attention` for few rows, in which each warp attends to places of its own.

A program alone on its SM waits for memory and for its warps, and hides neither: as `tl.dot` lays a tile out, all warps
meet several times for each. Here they meet once for 256 places, and twice at the end. The program turns q and its own
key, a pair of pairs a thread, and leaves them in shared memory, while what the warps ask of the cache is on its way.
Each warp goes through its places by itself and leaves for each head the largest score, the sum of weights and the
weighted sum of values, which threads put together in one order, with the token itself.

A warp takes 16 places or 32 at a time, and multiplies with `mma.m16n8k16`, whose operands it loads straight to the
lanes where the tensor cores want them, as `nf4_matmul` does. Lane 4 g + t holds

  * q of head g: of every 32 numbers those from 8 t on. Rows g + 8 of the product are zeros: there are 8 heads at most;
  * K of places g and g + 8, the same numbers. The order of k is free as long as both operands agree on it;
  * the scores of head g and places 2 t, 2 t + 1, 2 t + 8, 2 t + 9, which are its part of the second product's operand;
  * V of these four places: of every 64 numbers those from 8 g on. Numbers of two places are paired by `prmt`;
  * the sums of head g and of every 64 numbers those from 16 t on.
"""

import functools
from typing import no_type_check

import jax.numpy as jnp
import numpy as np

MOST_ROWS = 8
MOST_HEADS = 8  # of a key head
WIDTHS = (64, 128)
NUM_WARPS = 8
EACH = 32  # places of a warp at a time, of which 8 warps have 256 on their way
PAD = 64  # bytes behind a head in shared memory, so that no bank is asked twice


def shared_bytes(num_warps: int, group: int, width: int) -> int:
    """The shared memory of a program: q and its key, what each warp leaves of `group` heads, statistics."""
    return (group + 1) * (2 * width + PAD) + num_warps * group * (4 * width + 8) + 4 * group


def _scores_assembly(kind: str, steps: int) -> str:
    """PTX for the scores $0, $1 of q, 2 words a step from $2 on, and K, as many behind."""
    lines = [".reg .f32 c<4>;", ".reg .b32 z;", "mov.b32 z, 0;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(4))]
    for step in range(steps):
        q, k = 2 + 2 * step, 2 + 2 * steps + 2 * step
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            f"{{c0, c1, c2, c3}}, {{${q}, z, ${q + 1}, z}}, {{${k}, ${k + 1}}}, {{c0, c1, c2, c3}};"
        )
    return "{\n" + "\n".join([*lines, "mov.f32 $0, c0;", "mov.f32 $1, c1;"]) + "\n}"


def _values_assembly(kind: str) -> str:
    """PTX that adds to 16 sums, $34 and on, and so $0 and on, the products of weights $16, $17 and four places' 4 words
    of V, $18 and on: sums 2 e, 2 e + 1 are of each place's number e."""
    lines = [".reg .f32 c<4>;", ".reg .b32 z, b<2>;", "mov.b32 z, 0;"]
    for e in range(8):
        for i in range(2):
            first = 18 + 8 * i + e // 2
            lines.append(f"prmt.b32 b{i}, ${first}, ${first + 4}, {0x7632 if e % 2 else 0x5410};")
        lines += [f"mov.f32 c{i}, {f'${34 + 2 * e + i}' if i < 2 else '0f00000000'};" for i in range(4)]
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{c0, c1, c2, c3}, {$16, z, $17, z}, {b0, b1}, {c0, c1, c2, c3};"
        )
        lines += [f"mov.f32 ${2 * e + i}, c{i};" for i in range(2)]
    return "{\n" + "\n".join(lines) + "\n}"


def _asked_assembly(pieces: int, apart: int, space: str) -> str:
    """PTX that loads so many times 16 bytes, so many bytes apart, or zeros: their words, the first place, whether."""
    words = 4 * pieces
    lines = [".reg .pred p;", f"setp.ne.b32 p, ${words + 1}, 0;", *(f"mov.b32 ${i}, 0;" for i in range(words))]
    for i in range(pieces):
        four = ", ".join(f"${4 * i + j}" for j in range(4))
        lines.append(f"@p ld.{space}.v4.b32 {{{four}}}, [${words}+{apart * i}];")
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def kernel(dtype: np.dtype, num_warps: int, group: int, width: int):
    """The Triton function for `group` query heads of a key head. Built on first use, since the library imports where
    Triton is not installed."""
    import triton
    import triton.language as tl

    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    narrow = tl.constexpr(tl.bfloat16 if dtype == jnp.bfloat16 else tl.float16)
    ROW = tl.constexpr(2 * width + PAD)
    LEFT_AT = tl.constexpr((group + 1) * (2 * width + PAD))
    TOP_AT = tl.constexpr((group + 1) * (2 * width + PAD) + 4 * num_warps * group * width)
    SUM_AT = tl.constexpr((group + 1) * (2 * width + PAD) + 4 * num_warps * group * (width + 1))
    OWN_AT = tl.constexpr((group + 1) * (2 * width + PAD) + 4 * num_warps * group * (width + 2))
    HEADS = tl.constexpr(group)
    FOURS = tl.constexpr(width // 4)
    KEY_WORDS = tl.constexpr(width // 8)  # of a lane and place, 4 of each 32 numbers
    VALUE_PIECES = tl.constexpr(width // 64)  # of 16 bytes of a lane and place
    scores_assembly = tl.constexpr(_scores_assembly(kind, width // 16))
    scores_operands = tl.constexpr(",".join(["=&f"] * 2 + ["r"] * (width // 4)))
    values_assembly = tl.constexpr(_values_assembly(kind))
    values_operands = tl.constexpr(",".join(["=&f"] * 16 + ["r"] * 18 + ["f"] * 16))
    asked_key_assembly = tl.constexpr(_asked_assembly(width // 32, 64, "global"))
    asked_key_operands = tl.constexpr(",".join(["=&r"] * (width // 8) + ["l", "r"]))
    asked_value_assembly = tl.constexpr(_asked_assembly(width // 64, 128, "global"))
    asked_value_operands = tl.constexpr(",".join(["=&r"] * (width // 16) + ["l", "r"]))
    read_head_assembly = tl.constexpr(_asked_assembly(width // 32, 64, "shared"))
    read_head_operands = tl.constexpr(",".join(["=&r"] * (width // 8) + ["r", "r"]))
    area_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{shared_bytes(num_warps, group, width)}];"
        " mov.u32 $0, table; add.u32 $0, $0, $1; }"
    )
    put_word_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, $1; }"
    )
    put_float_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.b32 $0, $1; }"
    )
    put_four_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, $1; }"
    )
    read_float_assembly = tl.constexpr("ld.shared.f32 $0, [$1];")
    barrier_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
    other_assembly = tl.constexpr("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;")

    @triton.jit
    def numbers(word):
        """Both numbers of a word, float32."""
        low = (word & 0xFFFF).to(tl.uint16).to(narrow, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.uint16).to(narrow, bitcast=True).to(tl.float32)

    @triton.jit
    def word_of(low, high):
        low = low.to(narrow).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | high.to(narrow).to(tl.uint16, bitcast=True).to(tl.uint32) << 16

    @triton.jit
    def from_other(value, distance: tl.constexpr):
        return tl.inline_asm_elementwise(
            other_assembly, "=f,f,r", [value, distance], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def put(place, value, is_put, assembly: tl.constexpr, operands: tl.constexpr):
        tl.inline_asm_elementwise(
            assembly, operands, [place, value, is_put.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def read(place):
        return tl.inline_asm_elementwise(read_float_assembly, "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)

    @triton.jit
    def met(area):
        """The same place, once all warps have left there what they do."""
        return tl.inline_asm_elementwise(barrier_assembly, "=r,r", [area], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def asked(place, inside, assembly: tl.constexpr, operands: tl.constexpr, WORDS: tl.constexpr):
        """Words from a place on, or zeros."""
        return tl.inline_asm_elementwise(
            assembly, operands, [place, inside.to(tl.int32)], dtype=(tl.uint32,) * WORDS, is_pure=False, pack=1
        )

    @triton.jit
    def asked_key(place, inside):
        return asked(place, inside, asked_key_assembly, asked_key_operands, KEY_WORDS)

    @triton.jit
    def asked_value(place, inside):
        return asked(place, inside, asked_value_assembly, asked_value_operands, 4 * VALUE_PIECES)

    @triton.jit
    def read_head(place, inside):
        return asked(place, inside, read_head_assembly, read_head_operands, KEY_WORDS)

    @triton.jit
    def scores_of(query, key):
        return tl.inline_asm_elementwise(
            scores_assembly, scores_operands, query + key, dtype=(tl.float32,) * 2, is_pure=True, pack=1
        )

    @triton.jit
    def with_values(upper, lower, values, sums):
        return tl.inline_asm_elementwise(
            values_assembly,
            values_operands,
            (upper, lower) + values + sums,
            dtype=(tl.float32,) * 16,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def capped(score, SOFTCAP: tl.constexpr):
        """softcap * tanh(score / softcap), of a score that is times log2(e), and so the result."""
        LOG2E: tl.constexpr = 1.4426950408889634
        if SOFTCAP > 0:
            ratio = score / (SOFTCAP * LOG2E)
            even = tl.exp2(tl.abs(ratio) * (-2 * LOG2E))  # tanh |r| = (1 - e^-2|r|) / (1 + e^-2|r|)
            score = SOFTCAP * LOG2E * tl.where(ratio < 0, -1.0, 1.0) * (1.0 - even) / (1.0 + even)
        return score

    @triton.jit
    def left_at(area, warp, head, four):
        """Where a warp leaves a head's numbers 4 four and on. Places are exchanged so that 8 lanes of two heads ask
        different banks, and so do 8 threads of neighbouring numbers."""
        four = four ^ ((four >> 3) & 1) ^ ((head & 1) << 1)
        return area + LEFT_AT + ((warp * HEADS + head) * FOURS + four) * 16

    @triton.jit
    def decode_attention(
        q,  # [B, N, H]
        k,  # [B, K, H]
        v,
        keys,  # [layers, B, S, K, H]
        values,
        layer,  # int32 []
        cos,  # float32 [B, PAIRS]; unread if PAIRS is 0
        sin,
        offset,  # int32 [B], or [] if ONE_OFFSET
        segments,  # int32 [B, S]
        out,  # [B, N, H], or float32 [SPLIT, B, N, H]
        largest,  # float32 [SPLIT, B, N]; unwritten if SPLIT is 1
        total,
        new_keys,  # where keys and values are
        new_values,
        B: tl.constexpr,
        N: tl.constexpr,
        S: tl.constexpr,
        K: tl.constexpr,
        H: tl.constexpr,
        ONE_OFFSET: tl.constexpr,
        PAIRS: tl.constexpr,  # of numbers of a head that turn
        INTERLEAVED: tl.constexpr,
        SCALE: tl.constexpr,  # times log2(e)
        SOFTCAP: tl.constexpr,  # 0 for none
        WINDOW: tl.constexpr,  # 0 for none
        SPLIT: tl.constexpr,
        WARPS: tl.constexpr,
        EACH: tl.constexpr,  # places of a warp at a time
    ):
        GROUP: tl.constexpr = N // K
        THREADS: tl.constexpr = 32 * WARPS
        TILE: tl.constexpr = WARPS * EACH
        b, head = tl.program_id(0) // K, tl.program_id(0) % K
        part = tl.program_id(1)
        thread = tl.arange(0, THREADS)
        warp, lane = thread // 32, thread % 32
        group, t = lane // 4, lane % 4
        if not ONE_OFFSET:
            offset += b
        here = tl.load(offset)
        start = (tl.load(layer).to(tl.int64) * B + b) * (S * K * H) + head * H

        # A unit is two words of a head, or of the key: numbers that turn with each other, of two pairs.
        UNITS: tl.constexpr = (GROUP + 1) * (H // 4)
        area = tl.inline_asm_elementwise(area_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)
        queries = (q + (b * N + head * GROUP) * H).to(tl.pointer_type(tl.uint32))
        own_key = (k + (b * K + head) * H).to(tl.pointer_type(tl.uint32))
        turned = ()
        for i in tl.static_range((UNITS + THREADS - 1) // THREADS):
            unit = i * THREADS + thread
            of_head, u = unit // (H // 4), unit % (H // 4)
            is_unit, is_key = unit < UNITS, of_head == GROUP
            is_turned = u < PAIRS // 2
            if INTERLEAVED:
                first, second = 2 * u, 2 * u + 1
            else:
                first = tl.where(is_turned, u, 2 * u)
                second = tl.where(is_turned, u + PAIRS // 2, 2 * u + 1)
            source = tl.where(is_key, own_key, queries + of_head * (H // 2))
            one, two = tl.load(source + first, mask=is_unit, other=0), tl.load(source + second, mask=is_unit, other=0)
            if PAIRS > 0:
                angle = b * PAIRS + 2 * u
                cos_a = tl.load(cos + angle, mask=is_turned, other=1.0)
                cos_b = tl.load(cos + angle + 1, mask=is_turned, other=1.0)
                sin_a = tl.load(sin + angle, mask=is_turned, other=0.0)
                sin_b = tl.load(sin + angle + 1, mask=is_turned, other=0.0)
                one_a, one_b = numbers(one)
                two_a, two_b = numbers(two)
                if INTERLEAVED:
                    turned_one = word_of(one_a * cos_a - one_b * sin_a, one_b * cos_a + one_a * sin_a)
                    turned_two = word_of(two_a * cos_b - two_b * sin_b, two_b * cos_b + two_a * sin_b)
                else:
                    turned_one = word_of(one_a * cos_a - two_a * sin_a, one_b * cos_b - two_b * sin_b)
                    turned_two = word_of(two_a * cos_a + one_a * sin_a, two_b * cos_b + one_b * sin_b)
                one, two = tl.where(is_turned, turned_one, one), tl.where(is_turned, turned_two, two)
            place = area + of_head * ROW
            put(place + 4 * first, one, is_unit, put_word_assembly, "=r,r,r,r")
            put(place + 4 * second, two, is_unit, put_word_assembly, "=r,r,r,r")
            turned = turned + ((one, two, first, second, is_unit & is_key),)

        segments += b * S
        segment = tl.load(segments + tl.minimum(here, S - 1))
        written = tl.minimum(here, S)
        first_tile = 0
        if WINDOW:
            first_tile = tl.maximum(here - (WINDOW - 1), 0) // TILE
        tiles = tl.maximum((written + TILE - 1) // TILE - first_tile, 0)
        each = (tiles + SPLIT - 1) // SPLIT
        low = first_tile + part * each
        high = tl.minimum(low + each, first_tile + tiles)
        top = tl.full((THREADS,), float("-inf"), tl.float32)
        sum_ = tl.zeros((THREADS,), tl.float32)
        sums = ()
        for _ in tl.static_range(VALUE_PIECES):
            of_piece = ()
            for _ in tl.static_range(16):
                of_piece = of_piece + (tl.zeros((THREADS,), tl.float32),)
            sums = sums + (of_piece,)
        for tile in range(low, high):
            base = tile * TILE + warp * EACH
            asked_keys = ()
            for n in tl.static_range(EACH // 8):
                s = base + 8 * n + group
                asked_keys = asked_keys + (asked_key(keys + (start + s.to(tl.int64) * (K * H) + 8 * t), s < written),)
            asked_values, seen = (), ()
            for n in tl.static_range(EACH // 4):
                s = base + (8 * (n // 2) + 2 * t + n % 2)
                asked_values = asked_values + (
                    asked_value(values + (start + s.to(tl.int64) * (K * H) + 8 * group), s < written),
                )
                is_seen = tl.load(segments + s, mask=s < written, other=0) == segment
                is_seen = is_seen & (s < written)
                if WINDOW:
                    is_seen = is_seen & (here - s < WINDOW)
                seen = seen + (is_seen,)
            # All warps have left q, and nothing is asked for across a barrier: else the assembler asks for some of K,
            # multiplies by it, and then asks for more.
            area = met(area)
            query = read_head(area + group * ROW + 16 * t, group < GROUP)
            scores, now = (), top
            for n in tl.static_range(EACH // 8):
                pair = scores_of(query, asked_keys[n])
                for i in tl.static_range(2):
                    score = tl.where(seen[2 * n + i], capped(pair[i] * SCALE, SOFTCAP), float("-inf"))
                    scores, now = scores + (score,), tl.maximum(now, score)
            now = tl.maximum(now, from_other(now, 1))
            now = tl.maximum(now, from_other(now, 2))
            safe = tl.where(now == float("-inf"), 0.0, now)  # nothing is seen
            shrink = tl.exp2(top - safe)
            sum_, top = sum_ * shrink, now
            shrunk = ()
            for j in tl.static_range(VALUE_PIECES):
                of_piece = ()
                for e in tl.static_range(16):
                    of_piece = of_piece + (sums[j][e] * shrink,)
                shrunk = shrunk + (of_piece,)
            sums = shrunk
            for n in tl.static_range(EACH // 16):
                weights = ()
                for i in tl.static_range(4):
                    weight = tl.exp2(scores[4 * n + i] - safe)
                    weights, sum_ = weights + (weight,), sum_ + weight
                upper, lower = word_of(weights[0], weights[1]), word_of(weights[2], weights[3])
                more = ()
                for j in tl.static_range(VALUE_PIECES):
                    words = ()
                    for i in tl.static_range(4):
                        for w in tl.static_range(4):
                            words = words + (asked_values[4 * n + i][4 * j + w],)
                    more = more + (with_values(upper, lower, words, sums[j]),)
                sums = more
        sum_ = sum_ + from_other(sum_, 1)
        sum_ = sum_ + from_other(sum_, 2)

        # The token itself, whose key and value go to their place. One beyond the last is neither written nor seen.
        is_own = (part == 0) & (here < S)
        cached = start + here.to(tl.int64) * (K * H)
        cached_key = (new_keys + cached).to(tl.pointer_type(tl.uint32))
        for i in tl.static_range(len(turned)):
            one, two, first, second, is_key = turned[i]
            tl.store(cached_key + first, one, mask=is_key & is_own)
            tl.store(cached_key + second, two, mask=is_key & is_own)
        is_word = thread < H // 2
        own_value = (v + (b * K + head) * H).to(tl.pointer_type(tl.uint32))
        word = tl.load(own_value + thread, mask=is_word, other=0)
        tl.store((new_values + cached).to(tl.pointer_type(tl.uint32)) + thread, word, mask=is_word & is_own)
        area = met(area)
        query = read_head(area + group * ROW + 16 * t, group < GROUP)
        own_score, _ = scores_of(query, read_head(area + GROUP * ROW + 16 * t, group < 8))
        own_score = capped(own_score * SCALE, SOFTCAP)

        # What the warp leaves.
        is_head = group < GROUP
        statistic = 4 * (warp * GROUP + group)
        put(area + TOP_AT + statistic, top, is_head & (t == 0), put_float_assembly, "=r,r,f,r")
        put(area + SUM_AT + statistic, sum_, is_head & (t == 0), put_float_assembly, "=r,r,f,r")
        put(area + OWN_AT + 4 * group, own_score, is_head & (t == 0) & (warp == 0), put_float_assembly, "=r,r,f,r")
        for j in tl.static_range(VALUE_PIECES):
            for i in tl.static_range(2):  # numbers 16 t + 8 i and on of the 64
                for half in tl.static_range(2):
                    place = left_at(area, warp, group, 16 * j + 4 * t + 2 * i + half)
                    four = ()
                    for e in tl.static_range(4):
                        four = four + (sums[j][8 * half + 2 * e + i],)
                    tl.inline_asm_elementwise(
                        put_four_assembly,
                        "=r,r,f,f,f,f,r",
                        (place,) + four + (is_head.to(tl.int32),),
                        dtype=tl.int32,
                        is_pure=False,
                        pack=1,
                    )
        area = met(area)

        # A thread puts together a number of a head.
        for i in tl.static_range((GROUP * H + THREADS - 1) // THREADS):
            number = i * THREADS + thread
            inside = number < GROUP * H
            number = number % (GROUP * H)
            of_head, column = number // H, number % H
            own_score = tl.where(is_own, read(area + OWN_AT + 4 * of_head), float("-inf"))
            largest_of = own_score
            tops = ()
            for w in tl.static_range(WARPS):
                tops = tops + (read(area + TOP_AT + 4 * (w * GROUP + of_head)),)
                largest_of = tl.maximum(largest_of, tops[w])
            safe = tl.where(largest_of == float("-inf"), 0.0, largest_of)
            share = tl.exp2(own_score - safe)
            own = tl.load(v + ((b * K + head) * H + column), mask=inside, other=0.0).to(tl.float32)
            result, weight = tl.where(is_own, share * own, 0.0), share
            for w in tl.static_range(WARPS):
                share = tl.exp2(tops[w] - safe)
                weight += share * read(area + SUM_AT + 4 * (w * GROUP + of_head))
                result += share * read(left_at(area, w, of_head, column // 4) + 4 * (column % 4))
            at = (b * N + head * GROUP) * H + number
            if SPLIT == 1:
                # A row that is nobody's may see nothing.
                result = result / tl.where(weight > 0.0, weight, 1.0)
                tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
            else:
                tl.store(out + part * (B * N * H) + at, result, mask=inside)
                statistic = part * (B * N) + b * N + head * GROUP + of_head
                tl.store(largest + statistic, largest_of, mask=inside & (column == 0))
                tl.store(total + statistic, weight, mask=inside & (column == 0))

    return decode_attention


def constants(
    q_shape, cache_shape, one_offset, pairs, interleaved, scale, softcap, window, split, warps=NUM_WARPS
) -> dict:
    """The kernel's compile-time arguments."""
    (batch, heads, width), (_, _, places, kv, _) = q_shape, cache_shape
    return dict(
        B=batch, N=heads, S=places, K=kv, H=width, ONE_OFFSET=one_offset, PAIRS=pairs, INTERLEAVED=interleaved,
        SCALE=scale * 1.4426950408889634, SOFTCAP=softcap or 0.0, WINDOW=window or 0, SPLIT=split, WARPS=warps,
        EACH=EACH,
    )  # fmt: skip
