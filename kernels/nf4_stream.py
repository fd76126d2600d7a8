"""What the Triton functions of products with 9 to 64 tokens by `wgmma` have in common (`nf4_matmul_wgmma_kernel`,
`nf4_matmul_float8_kernel`): shared memory, which weight a tile is of, how x comes step by step, scales, and results.

Each function here returns Triton functions, built on first use, since the library imports where Triton is not
installed.
"""

import functools
from typing import no_type_check

from jaxlora.kernels import nf4_lookup, reference
from jaxlora.kernels.ordered import STEP as STEP_OF_X

MOST_TOKENS = 64
ROWS_OF_WARP = 16
STEP = STEP_OF_X // reference.NF4_BLOCK  # blocks, a line of 128 bytes of codes
MAP = 256 * 4  # bytes of `dynamic_map`
BARRIERS = 128  # bytes of the barriers, and of what little else a kernel keeps behind them
# What `createpolicy.fractional.L2::evict_first` makes, as CUTLASS has it (`TMA::CacheHintSm90`): a constant takes no
# registers. Codes are read once, and must not drive out of the cache what is read by every program or every layer.
EVICT_FIRST = 0x12F0 << 48


@functools.cache
@no_type_check  # a type checker's wrapper around a function would hide its source from Triton
def memory_kernels(fixed: int, ring: int):
    """(table_at, ring_at, whole) of `fixed` bytes that a program keeps, a multiple of 128, and a ring of so many bytes
    behind them."""
    import triton
    import triton.language as tl

    # Words, a power of two. Less than 48 KB would not be asked for, and with a table it is more than a program has.
    RING = tl.constexpr(max(1 << 14, 1 << (ring // 4 - 1).bit_length()))
    # What comes before the ring is a multiple of 128 bytes, since the ring begins where it ends.
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{fixed}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
    )
    ring_assembly = tl.constexpr("mov.u32 $0, global_smem; add.u32 $0, $0, $1;")
    kept_assembly = tl.constexpr("mov.b32 $0, $1;")
    whole_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")

    @triton.jit
    def table_at(thread):
        """Where the shared memory of the program begins."""
        return tl.inline_asm_elementwise(table_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def ring_at(thread):
        """Where x and codes are in shared memory. More than 48 KB must be asked for, and Triton asks for what its own
        operations need: this one, of a second row of programs, which there is not."""
        if tl.num_programs(1) > 1:
            words = tl.gather(tl.arange(0, RING), thread * 8, 0)
            tl.inline_asm_elementwise(kept_assembly, "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1)
        return tl.inline_asm_elementwise(ring_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def whole(place, lane):
        """An address of the lane itself. Where the assembler sees one in shared memory as a lane's part and one that is
        the same in all, it may give both to a copy that has a policy too, which is then an illegal instruction."""
        return tl.inline_asm_elementwise(whole_assembly, "=r,r,r", [place, lane], dtype=tl.int32, is_pure=False, pack=1)

    return table_at, ring_at, whole


@functools.cache
@no_type_check
def weight_kernels():
    """(asked_layer, in_stack, halves_at, next_line): which weight a tile is of, and where."""
    import triton
    import triton.language as tl

    of_layer = nf4_lookup.layer_kernel()
    # $1, and 0, which is what a thread's number has from bit 10 on. The assembler does not see that behind SHFL, nor
    # puts SHFL before a barrier, and so nothing that is made of $0.
    after_assembly = tl.constexpr(
        "{ .reg .b32 none; shfl.sync.idx.b32 none, $2, 0, 0x1f, 0xffffffff; shr.u32 none, none, 10;"
        " add.s32 $0, $1, none; }"
    )
    # By halves: what is added as one the assembler may keep in registers that are no pair, and copies for each address.
    next_line_assembly = tl.constexpr(
        "{ .reg .b32 lower, upper; mov.b64 {lower, upper}, $1; add.cc.u32 lower, lower, 128; addc.u32 upper, upper, 0;"
        " mov.b64 $0, {lower, upper}; }"
    )

    @triton.jit
    def asked_layer(index, STACKED: tl.constexpr):
        """Begin to load which of its stack a weight is."""
        layer = 0
        if STACKED:
            layer = tl.load(index)
        return layer

    @triton.jit
    def in_stack(weight, thread, BLOCKS: tl.constexpr, STACKED: tl.constexpr):
        """Where (codes, absmax, nested absmax, mean) of a weight begin. The layer is waited for here, not before the
        barriers are made and x is asked for."""
        fields = weight[0], weight[1], weight[2], weight[3]
        if STACKED:
            layer = tl.inline_asm_elementwise(
                after_assembly, "=r,r,r", [weight[4], thread], dtype=tl.int32, is_pure=False, pack=1
            )
            fields = of_layer(weight[0], weight[1], weight[2], weight[3], layer, weight[6], BLOCKS)
        return fields

    @triton.jit
    def halves_at(tile, weights, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr):
        """The weight (codes, absmax, nested absmax, mean, layer, out, rows, tiles before its first) that rows g are of,
        and that of rows g + 8; the tile's first row."""
        upper = weights[0]
        if GATED:
            lower, first_row = weights[1], ROWS // 2 * tile
        else:
            for i in tl.static_range(1, WEIGHTS):
                is_later = tile >= weights[i][7]
                chosen = ()
                for j in tl.static_range(8):
                    chosen = chosen + (tl.where(is_later, weights[i][j], upper[j]),)
                upper = chosen
            lower, first_row = upper, ROWS * (tile - upper[7])
        return upper, lower, first_row

    @triton.jit
    def next_line(codes):
        """The address of a lane's codes of the next step; by itself the compiler would keep where it began as well."""
        return tl.inline_asm_elementwise(next_line_assembly, "=l,l", [codes], dtype=tl.int64, is_pure=False, pack=1)

    return asked_layer, in_stack, halves_at, next_line


@functools.cache
@no_type_check
def x_kernels(places: int, step_bytes: int, num_warps: int):
    """(begin, copy, arrived, done) of steps of x of so many bytes, which shared memory has so many places for."""
    import triton
    import triton.language as tl

    STEP_BYTES = tl.constexpr(step_bytes)
    # Barriers of the places of x: those that say that it has come, and those that say that all warps are done with it.
    # One lane makes them and asks for the first step: addresses and numbers are then the same in all lanes, for which
    # an instruction takes them, and nothing is done by lanes one after another.
    begin_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0;\n"
        "@p bra END;\n"
        + "".join(
            f"mbarrier.init.shared::cta.b64 [$1+{8 * i}], {1 if i < places else num_warps};\n"
            for i in range(2 * places)
        )
        + "fence.mbarrier_init.release.cluster;\n"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {step_bytes};\n"
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [$3], {step_bytes}, [$1];\n"
        "END: bar.warp.sync 0xffffffff; mov.b32 $0, $1; }"
    )
    # One lane waits until the place is free and begins to copy; the other warps jump over it.
    copy_assembly = tl.constexpr(
        "{ .reg .pred p, done;\n"
        "setp.ne.b32 p, $5, 0;\n"
        "@p bra END;\n"
        f"WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [$1+{8 * places}], $4;\n"
        "@!done bra WAIT;\n"
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {step_bytes};\n"
        f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [$3], {step_bytes}, [$1];\n"
        "END: bar.warp.sync 0xffffffff; mov.b32 $0, $1; }"
    )
    arrived_assembly = tl.constexpr(
        "{ .reg .pred done;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;\n"
        "@!done bra WAIT;\n"
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1; }"
    )
    done_assembly = tl.constexpr(
        "{ .reg .pred p; setp.eq.b32 p, $2, 0; setp.gt.and.s32 p, $3, $4, p;\n"
        f"@p mbarrier.arrive.shared::cta.b64 _, [$1+{8 * places}]; mov.b32 $0, $1; }}"
    )

    @triton.jit
    def begin(x, barriers, ring, thread):
        """Make the barriers and begin to copy the first step of x."""
        tl.inline_asm_elementwise(
            begin_assembly, "=r,r,r,l,r", [barriers, ring, x, thread], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def copy(x, place, phase, is_none, barriers, ring, thread):
        """Begin to copy a step of x into a place, when all warps are done with what was there."""
        tl.inline_asm_elementwise(
            copy_assembly,
            "=r,r,r,l,r,r",
            [barriers + 8 * place, ring + STEP_BYTES * place, x, thread * 0 + phase, thread | is_none.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def arrived(place, phase, barriers, thread):
        """Wait until a place's step has come."""
        tl.inline_asm_elementwise(
            arrived_assembly,
            "=r,r,r",
            [barriers + 8 * place, thread * 0 + phase],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def done(place, step, start, barriers, lane):
        """Say that a warp is done with a place, from the second step on."""
        tl.inline_asm_elementwise(
            done_assembly,
            "=r,r,r,r,r",
            [barriers + 8 * place, lane, step, start],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    return begin, copy, arrived, done


@functools.cache
@no_type_check
def scale_kernels(map_at: int):
    """(put_map, asked_nested, asked_mean, asked_statistics, mapped, from_lane): the statistics of a weight's rows, with
    `dynamic_map` at so many bytes of the table."""
    import triton
    import triton.language as tl

    MAP_AT = tl.constexpr(map_at)
    mapped_assembly = tl.constexpr("ld.shared.f32 $0, [$1];")
    put_assembly = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
    from_lane_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # among 4 lanes

    @triton.jit
    def put_map(table, values, thread, THREADS: tl.constexpr):
        """Put `dynamic_map`, of which a lane has asked for some, into shared memory."""
        for i in tl.static_range((256 + THREADS - 1) // THREADS):
            code = (i * THREADS + thread) % 256
            tl.inline_asm_elementwise(
                put_assembly,
                "=r,r,f",
                [table + (MAP_AT + 4 * code), values[i]],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def asked_nested(half, at, NESTED: tl.constexpr):
        """Begin to load nested absmax of block `at` of a weight."""
        nested = 0.0
        if NESTED:
            nested = tl.load(half[2] + (at >> 8))
        return nested

    @triton.jit
    def asked_mean(half, NESTED: tl.constexpr):
        """Begin to load what is added to all scales of a weight."""
        mean = 0.0
        if NESTED:
            mean = tl.load(half[3])
        return mean

    @triton.jit
    def asked_statistics(half, at, nested, NESTED: tl.constexpr, OF_ROW: tl.constexpr):
        """Begin to load absmax, and nested absmax unless a row has but one, of block `at` of a weight. Beyond the last
        block of a row it is that of the last: there x is zero, and any finite scale will do."""
        if not OF_ROW:
            nested = asked_nested(half, at, NESTED)
        return tl.load(half[1] + at), nested

    @triton.jit
    def mapped(statistics, table, NESTED: tl.constexpr):
        """Statistics whose absmax is looked up in shared memory, if it is a code."""
        value, nested = statistics
        if NESTED:
            place = table + (MAP_AT + 4 * value.to(tl.int32))
            value = tl.inline_asm_elementwise(mapped_assembly, "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)
        return value, nested

    @triton.jit
    def from_lane(value, lane):
        """What a lane of four has."""
        return tl.inline_asm_elementwise(
            from_lane_assembly, "=r,r,r", [value, lane], dtype=value.dtype, is_pure=True, pack=1
        )

    return put_map, asked_nested, asked_mean, asked_statistics, mapped, from_lane


@functools.cache
@no_type_check
def result_kernels():
    """(joined, turned): what a lane stores."""
    import triton
    import triton.language as tl

    turn_assembly = tl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")

    @triton.jit
    def joined(first, second):
        """Two numbers of x's dtype or float32 in one of twice the bits."""
        BITS: tl.constexpr = first.dtype.primitive_bitwidth
        one: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint16
        both: tl.constexpr = tl.uint64 if BITS == 32 else tl.uint32
        return first.to(one, bitcast=True).to(both) | second.to(one, bitcast=True).to(both) << BITS

    @triton.jit
    def turned(word):
        """Of 8 rows g and 8 tokens, where a lane has tokens 2 t and the next of row g: rows 2 t and the next of
        token g."""
        return tl.inline_asm_elementwise(turn_assembly, "=r,r", [word], dtype=tl.uint32, is_pure=False, pack=1)

    return joined, turned
