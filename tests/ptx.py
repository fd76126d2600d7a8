"""An interpreter of PTX for compute capability 9.0 that runs one kernel on the CPU, to check what it computes.

    with emulated(seed=0): y = nf4_matmul_float8.matmul_nf4(...)

What it models. Blocks one after another; in one the warps, which take turns at random by a seed, wait at `bar.sync`, at
barriers in shared memory (`mbarrier`) and, by some seeds, for their warpgroup at `wgmma`. A warp's 32 lanes go
together; where they diverge, those of the lowest place in the text go first, and so meet again. Memory: every access
must be aligned and within an array or shared memory, what is not written yet is random, inputs may not be written. Of
what is asynchronous nothing is there before it must be:

  * `cp.async`: until `cp.async.wait_group` covers it, reading or writing its destination is an error; then it is there
    for its lane, and for others after a barrier, as is what `st.shared` wrote.
  * `cp.async.bulk`: its destination may not be touched until it has come, some time later (by a seed at once, or not
    before all warps wait), and then the barrier has its bytes.
  * `wgmma`: multiplied, by the seed, at once, at random, or where `wgmma.wait_group` waits for it. Until that its
    results may not be read, and neither these nor its registers be written, and what it reads of shared memory must
    be there, copied in bulk (the asynchronous proxy) or written before a `fence.proxy.async`. No swizzle.

What it does not model. Time. Caches, and the order of memory between blocks. Barriers of parts of a warp or block.
Clusters. What the assembler makes of registers, and `wgmma.fence` (which registers it covers). How tensor cores round
within an instruction: here once, at the end of it. Approximations (`ex2.approx` and so on) are numpy's.
Instructions that were not needed so far raise `Unknown`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

LANES = 32
SHARED_BASE = 1024  # of the window of shared memory
GLOBAL_BASE, GLOBAL_GAP = 0x7F00_0000_0000, 1 << 20
EVERYONE, IN_FLIGHT, OF_WARP = -1, -2, 2048  # who may read a byte of shared memory; else a thread, or a warp from here
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
FLOAT8 = ml_dtypes.float8_e4m3fn
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")


class Unknown(NotImplementedError):
    """An instruction that the interpreter does not have."""


class Wrong(RuntimeError):
    """What a program must not do, with where it did."""


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(re.search(r"(\d+)$", kind)[1])


def dtype_of(kind: str):
    """numpy's of a type of PTX."""
    if kind == "pred":
        return np.bool_
    if kind in FLOATS:
        return FLOATS[kind]
    return (SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(kind)]


# ---- the text --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Instruction:
    text: str
    kind: str = "value"  # or "effect", "bra", "ret", "bar", "wait", "meet"
    run: Any = None
    targets: tuple[int, ...] = ()  # registers that it writes
    predicate: int | None = None
    is_negated: bool = False
    goal: Any = None


class Scope:
    def __init__(self, parent: Scope | None):
        self.parent, self.names = parent, {}

    def find(self, name: str):
        scope = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


def split(text: str) -> list[str]:
    """Operands, which commas in brackets do not part."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    rest = text[last:].strip()
    return [*parts, rest] if rest else parts


class Program:
    """The one entry of a text, each of its instructions a Python function."""

    def __init__(self, text: str):
        text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
        head, _, rest = text.partition(".visible .entry")
        parameters, _, rest = rest.partition("{")
        self.name = parameters.partition("(")[0].strip()
        self.parameters = [
            (m[2], bits_of(m[1])) for m in re.finditer(r"\.param\s+\.(\w+)[^,)]*?\s([\w$]+)\s*[,)\n]", parameters)
        ]
        self.classes = [32]  # bits of registers; register 0 is the carry
        self.code: list[Instruction] = []
        self.shared_at = SHARED_BASE
        self.constants: dict[str, Any] = {
            "np": np, "S": SEMANTICS, "f4": np.float32, "f8": np.float64, "u4": np.uint32, "u8": np.uint64,
        }  # fmt: skip
        self.of_text: dict[str, Any] = {}
        top = self.scope = Scope(None)
        for m in re.finditer(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]", head):
            top.names[m[1]] = ("extern", m[1])
        for m in SHARED.finditer(re.sub(r"\.extern[^;]*;", "", head)):
            self.declare_shared(m)
        self.parse("{" + rest)
        # Dynamic shared memory begins behind the static.
        self.dynamic_at = -(-self.shared_at // 16) * 16
        for instruction in self.code:
            if instruction.kind == "bra":
                scope, label = instruction.goal
                instruction.goal = scope.find(label + ":")
                assert instruction.goal is not None, instruction.text
        for name, make in list(self.constants.items()):
            if name.startswith("extern_"):
                self.constants[name] = np.full(LANES, self.dynamic_at, make)

    def declare_shared(self, m) -> None:
        align, size = int(m[1]), int(m[3])
        self.shared_at = -(-self.shared_at // align) * align
        self.scope.names[m[2]] = ("shared", self.shared_at)
        self.shared_at += size

    def parse(self, text: str) -> None:
        label, at, depth = re.compile(r"([A-Za-z_$][\w$]*)\s*:(?!:)"), 0, 0
        while at < len(text):
            if text[at].isspace() or text[at] == ";":
                at += 1
            elif text[at] == "{":
                self.scope, at, depth = Scope(self.scope), at + 1, depth + 1
            elif text[at] == "}":
                self.scope, at, depth = self.scope.parent, at + 1, depth - 1
                if depth == 0:
                    break
            elif text.startswith((".loc", ".file"), at):
                at = text.index("\n", at)
            elif m := label.match(text, at):
                self.scope.names[m[1] + ":"] = len(self.code)
                at = m.end()
            else:
                end = text.index(";", at)
                self.statement(" ".join(text[at:end].split()))
                at = end + 1

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            for name in names.split(","):
                name = name.strip()
                m = re.match(r"(.*)<(\d+)>$", name)
                for each in [f"{m[1]}{i}" for i in range(int(m[2]))] if m else [name]:
                    self.scope.names[each] = ("reg", len(self.classes))
                    self.classes.append(bits_of(kind))
        elif text.startswith(".shared"):
            self.declare_shared(SHARED.match(text))
        elif text.startswith((".pragma", ".param")):
            pass
        else:
            self.instruction(text)

    # -- operands

    def register(self, name: str) -> int | None:
        found = self.scope.find(name.strip())
        return found[1] if found and found[0] == "reg" else None

    def constant(self, value, dtype) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.full(LANES, value, dtype)
        return name

    def number(self, text: str, kind: str) -> str:
        """A constant's name."""
        bits = bits_of(kind)
        if kind == "pred":
            return self.constant(int(text, 0) != 0, np.bool_)
        if m := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
            value = int(m[1], 16)
        elif m := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            value = int(m[1], 16)
        elif re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            value = int(text.rstrip("U"), 0) & (1 << bits) - 1
        else:
            raise Unknown(f"operand {text!r}")
        name = self.constant(value, UNSIGNED[bits])
        if dtype_of(kind) is not UNSIGNED[bits]:
            self.constants[name] = self.constants[name].view(dtype_of(kind))
        return name

    def read(self, text: str, kind: str) -> str:
        """An expression of an operand as an array of a type."""
        text, bits = text.strip(), bits_of(kind)
        if text.startswith("{"):
            parts = split(text[1:-1])
            of = [self.read(part, f"b{bits // len(parts)}") for part in parts]
            each = bits // len(parts)
            packed = " | ".join(f"{p}.astype(np.uint{bits}) << np.uint{bits}({each * i})" for i, p in enumerate(of))
            return self.viewed(f"({packed})", kind)
        if kind == "pred" and text.startswith("!"):
            return f"~{self.read(text[1:], kind)}"
        slot = self.register(text)
        if slot is not None:
            of = self.classes[slot]
            expression = f"R[{slot}]" if of == bits or kind == "pred" else f"R[{slot}].astype(np.uint{bits})"
            return expression if kind == "pred" else self.viewed(expression, kind)
        if text.startswith("%"):
            return self.viewed(f"W.special({text!r})", kind)
        found = self.scope.find(text)
        if found and found[0] == "shared":
            return self.constant(found[1], UNSIGNED[bits])
        if found and found[0] == "extern":
            name = f"extern_{len(self.constants)}"
            self.constants[name] = UNSIGNED[bits]
            return name
        return self.number(text, kind)

    def viewed(self, expression: str, kind: str) -> str:
        if dtype_of(kind) is UNSIGNED.get(bits_of(kind)):
            return expression
        name = "t_" + kind
        self.constants[name] = dtype_of(kind)
        return f"{expression}.view({name})"

    def address(self, text: str) -> str:
        """An expression of an address, int64."""
        assert text.startswith("[") and text.endswith("]"), text
        base, sign, offset = re.match(r"\s*([^+\s]+(?:\.\w+)?)\s*(\+?)\s*(\S*)\s*$", text[1:-1]).groups()
        slot = self.register(base)
        if slot is not None:
            expression = f"R[{slot}].astype(np.int64)"
        else:
            expression = f"{self.read(base, 'b32')}.astype(np.int64)"
        return f"{expression} + {int(offset, 0)}" if sign and int(offset, 0) else expression

    def target(self, text: str) -> int:
        slot = self.register(text)
        assert slot is not None, text
        return slot

    def function(self, expression: str):
        if expression not in self.of_text:
            self.of_text[expression] = eval(f"lambda R, W, M: {expression}", self.constants)  # noqa: S307
        return self.of_text[expression]

    # -- instructions

    def instruction(self, text: str) -> None:
        m = re.match(r"(?:@(!?)([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if m is None:
            raise Unknown(text)
        negated, predicate, op, rest = m.groups()
        made = Instruction(text)
        if predicate:
            made.predicate, made.is_negated = self.target(predicate), bool(negated)
        try:
            self.make(made, op, op.split("."), split(rest))
        except (Unknown, KeyError, AssertionError, IndexError, ValueError) as error:
            raise Unknown(f"{text!r}: {error!r}") from error
        self.code.append(made)

    def value(self, made: Instruction, target: str, kind: str, expression: str) -> None:
        """An instruction that makes a register of an expression of a type."""
        slot = self.target(target)
        bits = self.classes[slot]
        if kind != "pred":
            if dtype_of(kind) is not UNSIGNED[bits_of(kind)]:
                if kind[0] == "s" and bits > bits_of(kind):
                    expression = f"({expression}).astype(np.int{bits})"
                    kind = f"s{bits}"
                expression = f"({expression}).view(np.uint{bits_of(kind)})"
            if bits != bits_of(kind):
                expression = f"({expression}).astype(np.uint{bits})"
        made.run, made.targets = self.function(expression), (slot,)

    def effect(self, made: Instruction, expression: str) -> None:
        made.kind, made.run = "effect", self.function(expression)

    def make(self, made: Instruction, op: str, words: list[str], args: list[str]) -> None:
        name, kind, read = words[0], words[-1], self.read
        binary = {"and": "&", "or": "|", "xor": "^"}
        if op.startswith("bra"):
            made.kind, made.goal = "bra", (self.scope, args[0])
        elif name in ("ret", "exit"):
            made.kind = "ret"
        elif op in ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.sync.aligned"):
            assert args == ["0"]
            made.kind = "bar"
        elif op in ("bar.warp.sync",):
            self.effect(made, f"W.synced(M, {read(args[0], 'b32')})")
        elif op == "fence.proxy.async" or op.startswith("fence.proxy.async"):
            self.effect(made, "W.proxy_fence()")
        elif op == "prefetch.global.L2":
            self.effect(made, f"W.fetch({self.address(args[0])}, M)")
        elif name in ("fence", "membar", "griddepcontrol", "createpolicy"):
            made.kind, made.run = "effect", lambda R, W, M: None
        elif name == "mov":
            self.mov(made, kind, args)
        elif name == "ld" and words[1] == "param":
            index = [p for p, _ in self.parameters].index(args[1].strip("[]"))
            self.value(made, args[0], kind, f"W.block.parameter({index}, np.uint{bits_of(kind)})")
        elif name in ("ld", "st"):
            self.access(made, words, args)
        elif name == "cvt":
            self.cvt(made, words, args)
        elif name == "cvta":
            self.value(made, args[0], kind, read(args[1], kind))
        elif name == "setp":
            self.setp(made, words, args)
        elif name == "selp":
            self.value(
                made, args[0], kind, f"np.where({read(args[3], 'pred')}, {read(args[1], kind)}, {read(args[2], kind)})"
            )
        elif name in binary:
            self.value(made, args[0], kind, f"{read(args[1], kind)} {binary[name]} {read(args[2], kind)}")
        elif name == "not":
            self.value(made, args[0], kind, f"~{read(args[1], kind)}")
        elif name in ("shl", "shr"):
            self.value(made, args[0], kind, f"S.{name}({read(args[1], kind)}, {read(args[2], 'b32')})")
        elif name == "shf":
            a, b, c = (read(arg, "b32") for arg in args[1:])
            self.value(made, args[0], "b32", f"S.shf({a}, {b}, {c}, {words[1] == 'l'}, {words[2] == 'wrap'})")
        elif name == "lop3":
            a, b, c = (read(arg, kind) for arg in args[1:4])
            self.value(made, args[0], kind, f"S.lop3({a}, {b}, {c}, {int(args[4], 0)})")
        elif name == "prmt":
            a, b, c = (read(arg, "b32") for arg in args[1:4])
            self.value(made, args[0], "b32", f"S.prmt({a}, {b}, {c})")
        elif name == "bfe":
            start, length = (read(arg, "b32") for arg in args[2:])
            self.value(made, args[0], kind, f"S.bfe({read(args[1], kind)}, {start}, {length})")
        elif name == "bfi":
            a, b = (read(arg, kind) for arg in args[1:3])
            self.value(made, args[0], kind, f"S.bfi({a}, {b}, {read(args[3], 'b32')}, {read(args[4], 'b32')})")
        elif op == "dp4a.u32.u32":
            a, b, c = (read(arg, "b32") for arg in args[1:])
            self.value(made, args[0], "b32", f"S.dp4a({a}, {b}, {c})")
        elif name == "shfl":
            assert words[1] == "sync" and "|" not in args[0]
            a, b, c, members = (read(arg, "b32") for arg in args[1:])
            self.value(made, args[0], "b32", f"W.shfl({words[2]!r}, {a}, {b}, {c}, {members}, M)")
        elif name == "redux":
            self.value(made, args[0], kind, f"W.redux({words[2]!r}, {read(args[1], kind)}, {read(args[2], 'b32')}, M)")
        elif name == "movmatrix":
            assert op == "movmatrix.sync.aligned.m8n8.trans.b16"
            self.value(made, args[0], "b32", f"W.turned({read(args[1], 'b32')}, M)")
        elif name in ("ldmatrix", "stmatrix"):
            self.matrix(made, words, args)
        elif name == "mbarrier":
            self.mbarrier(made, words, args)
        elif name == "cp":
            self.cp(made, op, args)
        elif name == "wgmma":
            self.wgmma(made, words, args)
        else:
            self.arithmetic(made, name, words, args)

    def mov(self, made: Instruction, kind: str, args: list[str]) -> None:
        if args[0].startswith("{"):
            parts = split(args[0][1:-1])
            each, whole = bits_of(kind) // len(parts), self.read(args[1], f"b{bits_of(kind)}")
            known = [(i, self.target(part)) for i, part in enumerate(parts) if part != "_"]
            of = [f"({whole} >> np.uint{bits_of(kind)}({each * i})).astype(np.uint{each})" for i, _ in known]
            assert all(self.classes[slot] == each for _, slot in known)
            made.run, made.targets = self.function(f"({', '.join(of)},)"), tuple(slot for _, slot in known)
            made.kind = "values"
        else:
            self.value(made, args[0], kind, self.read(args[1], kind))

    def access(self, made: Instruction, words: list[str], args: list[str]) -> None:
        kind, space = words[-1], next(w for w in words if w.partition("::")[0] in ("global", "shared"))
        count = next((int(w[1:]) for w in words if re.match(r"v[248]$", w)), 1)
        space, size = space.partition("::")[0], bits_of(kind) // 8
        values = args[0] if words[0] == "ld" else args[1]
        parts = split(values.strip()[1:-1]) if values.startswith("{") else [values]
        assert len(parts) == count, (parts, count)
        if words[0] == "ld":
            made.targets = slots = tuple(self.target(part) for part in parts)
            self.effect(made, f"W.load({space!r}, {self.address(args[1])}, {slots}, {size}, {kind[0] == 's'}, M)")
        else:
            of = ", ".join(self.read(part, f"b{8 * size}") for part in parts)
            self.effect(made, f"W.store({space!r}, {self.address(args[0])}, ({of},), {size}, M)")

    def matrix(self, made: Instruction, words: list[str], args: list[str]) -> None:
        count = next(int(w[1:]) for w in words if re.match(r"x[124]$", w))
        assert "m8n8" in words and words[-1] == "b16" and any(w.startswith("shared") for w in words)
        where, registers = args[::-1] if words[0] == "ldmatrix" else args
        parts = split(registers[1:-1]) if registers.startswith("{") else [registers]
        assert len(parts) == count
        turned = "trans" in words
        if words[0] == "ldmatrix":
            made.kind, made.targets = "values", tuple(self.target(part) for part in parts)
            made.run = self.function(f"W.load_matrix({self.address(where)}, {count}, {turned}, M)")
        else:
            of = ", ".join(self.read(part, "b32") for part in parts)
            self.effect(made, f"W.store_matrix({self.address(where)}, ({of},), {turned}, M)")

    def setp(self, made: Instruction, words: list[str], args: list[str]) -> None:
        kind, compare = words[-1], words[1]
        a, b = self.read(args[1], kind), self.read(args[2], kind)
        how = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
               "hs": ">="}  # fmt: skip
        if compare in how and not (compare == "ne" and kind in FLOATS):
            expression = f"({a} {how[compare]} {b})"
        elif compare in ("num", "nan"):
            nan = f"(np.isnan({a}) | np.isnan({b}))"
            expression = nan if compare == "nan" else f"~{nan}"
        elif compare == "ne":
            expression = f"(({a} < {b}) | ({a} > {b}))"
        else:  # or not ordered
            inverse = {"equ": "eq", "neu": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}[compare]
            expression = (
                f"~(({a} < {b}) | ({a} > {b}))" if inverse == "eq" and compare == "equ"
                else f"({a} != {b})" if compare == "neu" else f"~({a} {how[inverse]} {b})"
            )  # fmt: skip
        if len(args) == 4:
            how = {"and": "&", "or": "|", "xor": "^"}[words[2]]
            expression = f"({expression} {how} {self.read(args[3], 'pred')})"
        if "|" in args[0]:
            first, second = args[0].split("|")
            made.kind, made.targets = "values", (self.target(first), self.target(second))
            made.run = self.function(f"({expression}, ~{expression})")
        else:
            self.value(made, args[0], "pred", expression)

    def cvt(self, made: Instruction, words: list[str], args: list[str]) -> None:
        source, kind = words[-1], words[-2]
        flags = words[1:-2]
        if kind in ("f16x2", "bf16x2") and source == "f32":
            upper, lower = (self.read(arg, "f32") for arg in args[1:])
            self.value(made, args[0], "b32", f"S.joined({upper}, {lower}, {kind[:-2]!r}, {'relu' in flags})")
        elif kind == "e4m3x2":
            assert "satfinite" in flags and "relu" not in flags
            if source == "f32":
                upper, lower = (self.read(arg, "f32") for arg in args[1:])
            else:
                assert source == "f16x2"
                pair = self.read(args[1], "b32")
                lower, upper = (f"S.half({pair}, {i}, np.float16)" for i in range(2))
            self.value(made, args[0], "b16", f"S.float8({upper}, {lower})")
        elif kind == "f16x2" and source == "e4m3x2":
            self.value(made, args[0], "b32", f"S.of_float8({self.read(args[1], 'b16')})")
        else:
            a = self.read(args[1], source)
            self.constants["t_" + kind] = dtype_of(kind)
            if kind in FLOATS and source not in FLOATS:
                assert bits_of(kind) >= 32 or bits_of(source) <= 16
                self.value(made, args[0], kind, f"{a}.astype(t_{kind})")
            elif kind in FLOATS:
                rounding = next((f for f in flags if f in ("rn", "rni", "rzi", "rmi", "rpi")), "")
                whole = {"rni": "np.rint({})", "rzi": "np.trunc({})", "rmi": "np.floor({})", "rpi": "np.ceil({})"}
                a = whole.get(rounding, "{}").format(a)
                wide = "f8" if source == "f64" else "f4"
                self.value(made, args[0], kind, f"{a}.astype({wide}).astype(t_{kind})")
            elif source in FLOATS:
                rounding = next(f for f in flags if f in ("rni", "rzi", "rmi", "rpi"))
                self.value(made, args[0], kind, f"S.to_whole({a}, {rounding!r}, t_{kind})")
            else:
                assert "sat" not in flags
                self.value(made, args[0], kind, f"{a}.astype(t_{kind})")

    def arithmetic(self, made: Instruction, name: str, words: list[str], args: list[str]) -> None:
        kind, read = words[-1], self.read
        if kind in ("f16x2", "bf16x2"):
            of = ", ".join(read(arg, "b32") for arg in args[1:])
            assert not {"relu", "sat"} & set(words)
            self.value(made, args[0], "b32", f"S.pairs({name!r}, {kind[:-2]!r}, {of})")
            return
        if kind in FLOATS:
            of = ", ".join(read(arg, kind) for arg in args[1:])
            assert not {"sat", "relu", "rz", "rm", "rp"} & set(words)
            self.value(made, args[0], kind, f"S.floats({name!r}, {kind!r}, {'ftz' in words}, {of})")
            return
        a = [read(arg, kind) for arg in args[1:]]
        bits = bits_of(kind)
        if name == "add" and "cc" in words or name == "addc":
            carry = "R[0]" if name == "addc" else None
            made.kind, made.targets = "values", (self.target(args[0]), 0)
            made.run = self.function(f"S.add_carry({a[0]}, {a[1]}, {carry})")
            return
        simple = {
            "add": "{0} + {1}", "sub": "{0} - {1}", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
            "neg": "np.negative({0})", "abs": "np.abs({0})", "div": "S.div({0}, {1})", "rem": "S.rem({0}, {1})",
            "popc": "np.bitwise_count({0}).astype(np.uint32)",
        }  # fmt: skip
        if name in simple:
            self.value(made, args[0], kind, simple[name].format(*a))
        elif name in ("mul", "mad") and "wide" in words:
            wide = f"{kind[0]}{2 * bits}"
            self.constants["t_" + wide] = dtype_of(wide)
            expression = f"{a[0]}.astype(t_{wide}) * {a[1]}.astype(t_{wide})"
            self.value(made, args[0], wide, expression + (f" + {read(args[3], wide)}" if name == "mad" else ""))
        elif name in ("mul", "mad") and "hi" in words:
            wide = f"{kind[0]}{2 * bits}"
            self.constants["t_" + wide], self.constants["t_" + kind] = dtype_of(wide), dtype_of(kind)
            assert bits == 32
            product = f"{a[0]}.astype(t_{wide}) * {a[1]}.astype(t_{wide})"
            expression = f"(({product}) >> t_{wide}(32)).astype(t_{kind})"
            self.value(made, args[0], kind, expression + (f" + {a[2]}" if name == "mad" else ""))
        elif name in ("mul", "mad"):
            assert "lo" in words
            self.value(made, args[0], kind, f"{a[0]} * {a[1]}" + (f" + {a[2]}" if name == "mad" else ""))
        else:
            raise Unknown(made.text)

    def mbarrier(self, made: Instruction, words: list[str], args: list[str]) -> None:
        if words[1] == "init":
            self.effect(made, f"W.barrier_init({self.address(args[0])}, {self.read(args[1], 'b32')}, M)")
        elif words[1] == "inval":
            self.effect(made, "None")
        elif words[1] == "arrive":
            assert args[0] == "_"
            sent = self.read(args[2], "b32") if "expect_tx" in words else "None"
            assert len(args) == (3 if "expect_tx" in words else 2)
            self.effect(made, f"W.barrier_arrive({self.address(args[1])}, {sent}, M)")
        elif words[1] in ("try_wait", "test_wait") and words[2] == "parity":
            made.kind, made.targets = "wait", (self.target(args[0]),)
            made.run = self.function(f"W.barrier_wait({self.address(args[1])}, {self.read(args[2], 'b32')}, M)")
        else:
            raise Unknown(made.text)

    def cp(self, made: Instruction, op: str, args: list[str]) -> None:
        if op.startswith("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"):
            to, of, size, barrier = (
                self.address(args[0]), self.address(args[1]), self.read(args[2], "b32"), self.address(args[3])
            )  # fmt: skip
            self.effect(made, f"W.bulk({to}, {of}, {size}, {barrier}, M)")
        elif op.startswith(("cp.async.cg.shared.global", "cp.async.ca.shared.global")):
            assert len(args) in (3, 4) and (len(args) == 3 or "cache_hint" in op), "a source's size"
            self.effect(made, f"W.copy({self.address(args[0])}, {self.address(args[1])}, {int(args[2], 0)}, M)")
        elif op == "cp.async.commit_group":
            self.effect(made, "W.copies_commit(M)")
        elif op in ("cp.async.wait_group", "cp.async.wait_all"):
            self.effect(made, f"W.copies_wait({int(args[0]) if args else 0}, M)")
        else:
            raise Unknown(made.text)

    def wgmma(self, made: Instruction, words: list[str], args: list[str]) -> None:
        if words[1] == "fence":
            self.effect(made, "W.whole(M)")
        elif words[1] == "commit_group":
            self.effect(made, "W.products_commit(M)")
        elif words[1] == "wait_group":
            self.effect(made, f"W.products_wait({int(args[0])}, M)")
        else:
            n, k = map(int, re.match(r"m64n(\d+)k(\d+)$", words[4]).groups())
            into, of, other = words[5:8]
            assert of == other and (into, of) in (("f16", "e4m3"), ("f32", "bf16"), ("f32", "f16"), ("f32", "e4m3"))
            assert k == (32 if of == "e4m3" else 16)
            d, a = (tuple(self.target(r) for r in split(arg[1:-1])) for arg in args[:2])
            assert len(d) == (n // 4 if into == "f16" else n // 2) and len(a) == 4
            descriptor, added = self.read(args[2], "b64"), self.read(args[3], "pred")
            # Factors of a and b; of 16 bits besides whether b is transposed.
            assert args[4:] in (["1", "1"], ["1", "1", "0"]), args[4:]
            made.kind = "meet"
            made.run = self.function(f"W.multiply({d}, {a}, {descriptor}, {added}, {n}, {into!r}, {of!r}, M)")


# ---- what instructions compute ---------------------------------------------------------------------------------------


class SEMANTICS:
    """Of arrays of lanes."""

    @staticmethod
    def shl(a, by):
        bits = 8 * a.dtype.itemsize
        return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))

    @staticmethod
    def shr(a, by):
        bits = 8 * a.dtype.itemsize
        shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
        return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))

    @staticmethod
    def shf(a, b, c, left, wrap):
        by = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    @staticmethod
    def lop3(a, b, c, table):
        fast = LOP3.get(table)
        if fast is not None:
            return fast(a, b, c)
        out = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    @staticmethod
    def prmt(a, b, selector):
        table = np.stack([a, b], -1).view(np.uint8).reshape(LANES, 8)
        nibble = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        byte = np.take_along_axis(table, (nibble & 7).astype(np.int64), 1)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint8)
        return byte.view(np.uint32)[:, 0]

    @staticmethod
    def bfe(a, start, length):
        bits = 8 * a.dtype.itemsize
        start, length = (start & 255).astype(a.dtype), (length & 255).astype(a.dtype)
        if a.dtype.kind == "i":
            assert ((start + length) <= bits).all() and (length > 0).all()
            return (a << (bits - start - length)) >> (bits - length)
        assert (start < bits).all() and (length < bits).all()
        return (a >> start) & ((a.dtype.type(1) << length) - a.dtype.type(1))

    @staticmethod
    def bfi(a, b, start, length):
        start, length = start.astype(a.dtype), length.astype(a.dtype)
        mask = ((a.dtype.type(1) << length) - a.dtype.type(1)) << start
        return (a << start & mask) | (b & ~mask)

    @staticmethod
    def dp4a(a, b, c):
        product = a.view(np.uint8).reshape(LANES, 4).astype(np.uint32) * b.view(np.uint8).reshape(LANES, 4)
        return product.sum(1, dtype=np.uint32) + c

    @staticmethod
    def add_carry(a, b, carry):
        total = a.astype(np.uint64) + b + (0 if carry is None else carry)
        assert a.dtype == np.uint32
        return total.astype(np.uint32), (total >> np.uint64(32)).astype(np.uint32)

    @staticmethod
    def div(a, b):
        assert (b != 0).all()
        if a.dtype.kind == "u":
            return a // b
        return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)

    @staticmethod
    def rem(a, b):
        return a - SEMANTICS.div(a, b) * b

    @staticmethod
    def half(pair, i, dtype):
        return (pair >> np.uint32(16 * i)).astype(np.uint16).view(dtype)

    @staticmethod
    def joined(upper, lower, kind, relu=False):
        upper, lower = (np.maximum(v, 0) if relu else v for v in (upper, lower))
        upper, lower = (v.astype(FLOATS[kind]).view(np.uint16).astype(np.uint32) for v in (upper, lower))
        return upper << np.uint32(16) | lower

    @staticmethod
    def float8(upper, lower):
        one = lambda v: np.clip(v.astype(np.float32), -448, 448).astype(FLOAT8).view(np.uint8).astype(np.uint16)
        return one(upper) << np.uint16(8) | one(lower)

    @staticmethod
    def of_float8(pair):
        halves = [((pair >> np.uint16(8 * i)).astype(np.uint8)).view(FLOAT8).astype(np.float16) for i in range(2)]
        return halves[1].view(np.uint16).astype(np.uint32) << np.uint32(16) | halves[0].view(np.uint16)

    @staticmethod
    def to_whole(a, rounding, dtype):
        whole = dict(rni=np.rint, rzi=np.trunc, rmi=np.floor, rpi=np.ceil)[rounding](a.astype(np.float64))
        info = np.iinfo(dtype)
        return np.clip(np.nan_to_num(whole, nan=0.0), info.min, info.max).astype(dtype)

    @staticmethod
    def pairs(name, kind, *of):
        dtype = FLOATS[kind]
        of = [v.view(dtype).astype(np.float64) for v in of]  # [2 * lanes]
        return OF_FLOATS[name](*of).astype(np.float64 if kind == "f16" else np.float32).astype(dtype).view(np.uint32)

    @staticmethod
    def floats(name, kind, ftz, *of):
        dtype = FLOATS[kind]
        if name in ("fma", "mad") or kind in ("f16", "bf16"):
            out = OF_FLOATS[name](*(v.astype(np.float64) for v in of))
            return out.astype(np.float32).astype(dtype) if kind == "bf16" else out.astype(dtype)
        out = OF_FLOATS[name](*of)
        if ftz:
            out = np.where(np.abs(out) < 2.0**-126, np.float32(0), out)
        return out.astype(dtype, copy=False)


LOP3 = {
    0xE4: lambda a, b, c: (a & c) | (b & ~c),
    0xB1: lambda a, b, c: (a & c) | (~b & ~c),
    0xB4: lambda a, b, c: a ^ (b & ~c),
    0xC0: lambda a, b, c: a & b,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xEA: lambda a, b, c: (a & b) | c,
}
OF_FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "min": np.fmin, "max": np.fmax, "fma": lambda a, b, c: a * b + c, "mad": lambda a, b, c: a * b + c,
    "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "ex2": np.exp2, "lg2": np.log2,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
}  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------------


class Memory:
    """Global memory: arrays at addresses far apart."""

    def __init__(self):
        self.bases: list[int] = []
        self.arrays: list[tuple[np.ndarray, str, bool]] = []
        self.written: list[np.ndarray] = []
        self.fetched: list[tuple[str, int]] = []  # lines of 128 bytes into L2: of which array, and where

    def add(self, data: np.ndarray, name: str, writable: bool) -> int:
        last = self.bases[-1] + -(-self.arrays[-1][0].size // 256) * 256 if self.bases else GLOBAL_BASE
        base = last + GLOBAL_GAP
        self.bases.append(base)
        self.arrays.append((data, name, writable))
        self.written.append(np.zeros(data.size if writable else 0, np.uint16))
        return base

    def places(self, address: np.ndarray, size: int, align: int, what: str):
        """(array's number, offsets) of lanes' addresses, all of one array."""
        if (address % align).any():
            raise Wrong(f"{what} of {size} bytes at {hex(address[address % align != 0][0])}, not a multiple of {align}")
        number = np.searchsorted(self.bases, address[0], "right") - 1
        if number < 0:
            raise Wrong(f"{what} at {hex(int(address[0]))}, where nothing is")
        offset = address - self.bases[number]
        data, name, _ = self.arrays[number]
        bad = (offset < 0) | (offset + size > data.size)
        if bad.any():
            at, lanes = int(offset[bad][0]), np.flatnonzero(bad)
            raise Wrong(f"{what} of {size} bytes at {at} of {name}, which has {data.size}, by {lanes}")
        return number, offset

    def groups(self, address: np.ndarray):
        """Lanes by array."""
        number = np.searchsorted(self.bases, address, "right")
        if (number == number[0]).all():
            yield slice(None)
        else:
            for each in np.unique(number):
                yield np.flatnonzero(number == each)

    def read(self, address: np.ndarray, size: int, align: int) -> np.ndarray:
        """[lanes, size] bytes."""
        out = np.empty((address.size, size), np.uint8)
        for lanes in self.groups(address):
            number, offset = self.places(address[lanes], size, align, "read")
            data, name, writable = self.arrays[number]
            at = offset[:, None] + np.arange(size)
            if writable and (self.written[number][at] == 0).any():
                raise Wrong(f"read of {name}, a result, where nothing was written")
            out[lanes] = data[at]
        return out

    def write(self, address: np.ndarray, values: np.ndarray, align: int) -> None:
        size = values.shape[1]
        for lanes in self.groups(address):
            number, offset = self.places(address[lanes], size, align, "write")
            data, name, writable = self.arrays[number]
            if not writable:
                raise Wrong(f"write at {int(offset[0])} of {name}, an argument")
            at = offset[:, None] + np.arange(size)
            data[at] = values[lanes]
            np.add.at(self.written[number], at, 1)


@dataclasses.dataclass
class Barrier:
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise Wrong("more arrivals than a barrier expects")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclasses.dataclass
class Bulk:
    at: np.ndarray
    data: np.ndarray
    barrier: Barrier


@dataclasses.dataclass
class Product:
    group: int
    d: tuple[int, ...]
    a: tuple[int, ...]
    descriptor: int
    added: bool
    n: int
    into: str
    of: str
    is_done: bool = False


# ---- warps and blocks ------------------------------------------------------------------------------------------------


class Warp:
    def __init__(self, block: Block, number: int):
        program = block.program
        self.block, self.number = block, number
        self.registers: list[Any] = [None] * len(program.classes)
        self.thread = np.arange(LANES * number, LANES * (number + 1))
        self.pc: int = 0
        self.pcs: np.ndarray | None = None  # of lanes that diverge
        self.state = "ready"  # or "bar", "wait", "meet", "done"
        self.waits: Any = None
        self.refused: int | None = None  # the `try_wait` that said no last
        self.copies: list[list[tuple[np.ndarray, np.ndarray, int]]] = [[]]  # groups, the last not committed
        self.products: list[Product] = []
        self.group = 0  # of products, which is not committed
        self.flight: dict[int, Any] = {}  # accumulators of products that are not waited for
        self.locked: set[int] = set()
        self.met = 0
        self.dirty: list[np.ndarray] = []  # bytes that lanes wrote since the warp was synchronised
        self.dirty_block: list[np.ndarray] = []
        self.reads: list[np.ndarray] = []  # [lanes, bytes] since then
        self.executed = 0
        self.specials: dict[str, np.ndarray] = {}

    # -- registers

    def put(self, slot: int, value: np.ndarray, mask) -> None:
        if slot in self.locked:
            raise Wrong(f"register {slot} is written while wgmma may use it")
        if mask is not None:
            old = self.garbage(slot) if self.registers[slot] is None else self.registers[slot]
            value = np.where(mask, value, old)
        self.registers[slot] = value

    def garbage(self, slot: int) -> np.ndarray:
        bits = self.block.program.classes[slot]
        if bits == 1:
            return np.ones(LANES, np.bool_)
        return np.full(LANES, 0xDEADBEEF_DEADBEEF & (1 << bits) - 1, UNSIGNED[bits])

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            self.specials[name] = self.made_special(name)
        return self.specials[name]

    def made_special(self, name: str) -> np.ndarray:
        block = self.block
        scalars = {
            "%ctaid.x": block.at[0], "%ctaid.y": block.at[1], "%ctaid.z": block.at[2],
            "%nctaid.x": block.grid[0], "%nctaid.y": block.grid[1], "%nctaid.z": block.grid[2],
            "%ntid.x": LANES * block.num_warps, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0,
            "%warpid": self.number, "%clusterid.x": block.at[0], "%cluster_ctarank": 0,
        }  # fmt: skip
        if name in scalars:
            return np.full(LANES, scalars[name], np.uint32)
        if name == "%tid.x":
            return self.thread.astype(np.uint32)
        if name == "%laneid":
            return np.arange(LANES, dtype=np.uint32)
        raise Unknown(name)

    # -- among lanes

    def whole(self, mask) -> None:
        if mask is not None:
            raise Wrong("not all lanes of a warp are here")

    def synced(self, mask, members) -> None:
        self.whole(mask)
        assert (members == 0xFFFFFFFF).all()
        seen = self.block.seen
        for at in self.dirty:
            part = seen[at]
            seen[at] = np.where((part >= 0) & (part < OF_WARP), OF_WARP + self.number, part)
        self.dirty_block += self.dirty
        self.dirty, self.reads = [], []

    def shfl(self, mode, a, b, c, members, mask):
        self.whole(mask)
        assert (members == 0xFFFFFFFF).all()
        lane = np.arange(LANES)
        clamp, segment = (c & 31).astype(int), (c >> np.uint32(8) & 31).astype(int)
        most = (lane & segment) | (clamp & ~segment)
        by = (b & 31).astype(int)
        if mode == "idx":
            source = (lane & segment) | (by & ~segment)
            valid = source <= most
        elif mode == "bfly":
            source = lane ^ by
            valid = source <= most
        elif mode == "up":
            source = lane - by
            valid = source >= most
        else:
            source = lane + by
            valid = source <= most
        return a[np.where(valid, source, lane)]

    def redux(self, mode, a, members, mask):
        self.whole(mask)
        assert (members == 0xFFFFFFFF).all()
        how = {"max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}
        return np.full(LANES, how[mode](a), a.dtype)

    def turned(self, word, mask):
        self.whole(mask)
        matrix = word.view(np.uint16).reshape(8, 8)  # lane 4 g + t has 2 t and the next of row g
        return np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint32)

    # -- memory

    def active(self, mask):
        return slice(None) if mask is None else np.flatnonzero(mask)

    def load(self, space, address, slots, size, signed, mask) -> None:
        lanes = self.active(mask)
        whole = size * len(slots)
        read = self.block.memory.read if space == "global" else self.read_shared
        if space == "global":
            got = read(address[lanes], whole, whole)
        else:
            got = read(address[lanes], whole, self.thread[lanes])
        for i, slot in enumerate(slots):
            part = np.ascontiguousarray(got[:, size * i : size * (i + 1)]).view(UNSIGNED[8 * size])[:, 0]
            to = UNSIGNED[self.block.program.classes[slot]]
            if signed:
                part = part.view(SIGNED[8 * size]).astype(SIGNED[8 * to().itemsize])
            part = part.astype(to)
            if mask is not None:
                full = np.zeros(LANES, to)
                full[lanes] = part
                part = full
            self.put(slot, part, mask)

    def store(self, space, address, values, size, mask) -> None:
        lanes = self.active(mask)
        data = np.concatenate([v[lanes].view(np.uint8).reshape(-1, size) for v in values], 1)
        whole = data.shape[1]
        if space == "global":
            self.block.memory.write(address[lanes], data, whole)
            return
        at = self.places(address[lanes], whole, whole, "write")
        block = self.block
        self.may_write(at, self.thread[lanes])
        block.shared[at] = data
        block.generic[at] = True
        self.owned(at, self.thread[lanes])

    def fetch(self, address, mask) -> None:
        memory = self.block.memory
        address = address[self.active(mask)]
        for lanes in memory.groups(address):
            number, offset = memory.places(address[lanes], 128, 128, "a fetch")
            memory.fetched += [(memory.arrays[number][1], int(at)) for at in offset]

    def load_matrix(self, address, count, turned, mask):
        self.whole(mask)
        out = []
        for i in range(count):  # rows of which are at lanes 8 i .. 8 i + 7
            at = self.places(address[8 * i : 8 * i + 8], 16, 16, "read")
            seen = self.block.seen[at]
            if not ((seen == EVERYONE) | (seen == OF_WARP + self.number)).all():
                raise Wrong(f"ldmatrix at {at[:, 0]} of what is not there yet")
            matrix = self.block.shared[at].view(np.uint16)
            out.append(np.ascontiguousarray(matrix.T if turned else matrix).reshape(-1).view(np.uint32))
        return out

    def store_matrix(self, address, values, turned, mask) -> None:
        self.whole(mask)
        for i, value in enumerate(values):
            at = self.places(address[8 * i : 8 * i + 8], 16, 16, "write")
            matrix = value.view(np.uint16).reshape(8, 8)
            self.may_write(at, self.thread[8 * i : 8 * i + 8])
            self.block.shared[at] = np.ascontiguousarray(matrix.T if turned else matrix).view(np.uint8)
            self.block.generic[at] = True
            # Of no lane: for any other it is there after a barrier.
            self.owned(at, np.full(8, OF_WARP - 1))

    def places(self, address, size, align, what) -> np.ndarray:
        """Bytes of shared memory, [lanes, size]."""
        at = address - SHARED_BASE
        if (address % align).any():
            raise Wrong(f"{what} of {size} bytes of shared memory, not at a multiple of {align}: {address}")
        if (at < 0).any() or (at + size > self.block.shared.size).any():
            raise Wrong(f"{what} of {size} bytes at {at} of shared memory, which has {self.block.shared.size}")
        return at[:, None] + np.arange(size)

    def owned(self, at, threads) -> None:
        self.block.seen[at] = threads[:, None]
        self.dirty.append(at.ravel())

    def may_write(self, at, threads) -> None:
        seen = self.block.seen[at]
        if (seen == IN_FLIGHT).any():
            raise Wrong(f"write of shared memory at {at[:, 0]} that is being copied to")
        for lanes_read in self.reads:  # by other lanes, since the warp was synchronised
            for i, thread in enumerate(threads):
                others = np.delete(lanes_read, thread % LANES, 0)
                if np.isin(at[i], others).any():
                    raise Wrong(f"write of shared memory at {at[i, 0]} that another lane may not have read yet")

    def read_shared(self, address, size, threads) -> np.ndarray:
        at = self.places(address, size, size, "read")
        seen = self.block.seen[at]
        fine = (seen == EVERYONE) | (seen == OF_WARP + self.number) | (seen == threads[:, None])
        if not fine.all():
            raise Wrong(f"read of shared memory at {at[~fine.all(1), 0]} that is not there yet: {seen[~fine][:4]}")
        if len(threads) == LANES:
            self.reads.append(at)
        return self.block.shared[at]

    # -- barriers

    def barrier_init(self, address, count, mask) -> None:
        for lane in np.arange(LANES)[self.active(mask)]:
            at = self.places(address[lane : lane + 1], 8, 8, "barrier")
            self.owned(at, self.thread[lane : lane + 1])
            self.block.barriers[int(address[lane])] = Barrier(int(count[lane]), int(count[lane]))

    def barrier(self, address: int, lane: int) -> Barrier:
        if address not in self.block.barriers:
            raise Wrong(f"no barrier is at {address}")
        seen = self.block.seen[address - SHARED_BASE]
        if seen not in (EVERYONE, OF_WARP + self.number, self.thread[lane]):
            raise Wrong(f"a barrier at {address} that was not made for this warp yet")
        return self.block.barriers[address]

    def barrier_arrive(self, address, sent, mask) -> None:
        for lane in np.arange(LANES)[self.active(mask)]:
            barrier = self.barrier(int(address[lane]), lane)
            barrier.bytes += 0 if sent is None else int(sent[lane])
            barrier.pending -= 1
            barrier.settle()

    def barrier_wait(self, address, parity, mask):
        """(what each lane is told, what the warp waits for if none is done)."""
        told, waits = np.zeros(LANES, bool), []
        for lane in np.arange(LANES)[self.active(mask)]:
            barrier = self.barrier(int(address[lane]), lane)
            if parity[lane] not in (0, 1):
                raise Wrong(f"a phase of {parity[lane]}")
            told[lane] = barrier.phase % 2 != parity[lane]  # whether that phase is over
            if not told[lane]:
                waits.append((barrier, int(parity[lane])))
        return told, waits

    # -- copies

    def bulk(self, to, of, size, barrier, mask) -> None:
        for lane in np.arange(LANES)[self.active(mask)]:
            length = int(size[lane])
            assert length % 16 == 0
            at = self.places(to[lane : lane + 1], length, 16, "bulk copy")[0]
            data = self.block.memory.read(of[lane : lane + 1], length, 16)[0]
            seen = self.block.seen
            if (seen[at] == IN_FLIGHT).any():
                raise Wrong("a bulk copy to where another one is under way")
            seen[at] = IN_FLIGHT
            self.block.shared[at] = 0xFF
            self.block.bulks.append(Bulk(at, data, self.barrier(int(barrier[lane]), lane)))

    def copy(self, to, of, size, mask) -> None:
        lanes = self.active(mask)
        at = self.places(to[lanes], size, size, "asynchronous copy")
        self.may_write(at, self.thread[lanes])
        data = self.block.memory.read(of[lanes], size, size)
        self.block.seen[at] = IN_FLIGHT
        self.block.shared[at] = 0xFF
        if np.unique(at).size != at.size:
            raise Wrong("lanes copy to the same places")
        self.copies[-1].append((at, data, self.thread[lanes]))

    def copies_commit(self, mask) -> None:
        self.whole(mask)
        self.copies.append([])

    def copies_wait(self, left: int, mask) -> None:
        self.whole(mask)
        while len(self.copies) - 1 > left:
            for at, data, threads in self.copies.pop(0):
                self.block.shared[at] = data
                self.block.generic[at] = True
                self.owned(at, threads)

    def proxy_fence(self) -> None:
        self.block.generic[:] = False

    # -- products

    def multiply(self, d, a, descriptor, added, n, into, of, mask) -> None:
        self.whole(mask)
        assert (descriptor == descriptor[0]).all() and (added == added[0]).all()
        made = Product(self.group, d, a, int(descriptor[0]), bool(added[0]), n, into, of)
        for slot in a:
            if slot in self.flight or self.registers[slot] is None:
                raise Wrong("wgmma of registers that are not there")
        for slot in d:
            if slot not in self.flight:
                if slot in self.locked:
                    raise Wrong("results of wgmma in registers that another one reads")
                self.flight[slot] = self.registers[slot]
                self.registers[slot] = None
        self.locked |= {*a, *d}
        self.products.append(made)
        if self.block.policy.products == "now":
            self.multiplied(made)

    def multiplied(self, p: Product) -> None:
        if p.is_done:
            return
        p.is_done = True
        lane = np.arange(LANES)
        g, t = lane // 4, lane % 4
        dtype = {"e4m3": FLOAT8, "bf16": ml_dtypes.bfloat16, "f16": np.float16}[p.of]
        size = np.dtype(dtype).itemsize
        per, k = 4 // size, 32 // size  # elements of a register and of a row
        left = np.zeros((16, k), np.float64)
        for i, slot in enumerate(p.a):
            words = self.registers[slot].view(dtype).reshape(LANES, per).astype(np.float64)
            left[(g + 8 * (i % 2))[:, None], per * t[:, None] + np.arange(per) + k // 2 * (i // 2)] = words
        d = p.descriptor
        if d >> 62 or d >> 49 & 7:
            raise Wrong(f"a descriptor {d:#x} with a swizzle")
        start, across, down = ((d >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        m, column = np.arange(p.n)[:, None], np.arange(k)
        at = start - SHARED_BASE + m // 8 * down + m % 8 * 16 + column * size // 16 * across + column * size % 16
        block = self.block
        if at.min() < 0 or at.max() + size > block.shared.size:
            raise Wrong(f"wgmma reads at {at.min()}..{at.max()} of shared memory, which has {block.shared.size}")
        if (block.seen[at] != EVERYONE).any():
            raise Wrong("wgmma reads what has not come or is being overwritten")
        if block.generic[at].any():
            raise Wrong("wgmma reads what was not written by the asynchronous proxy")
        right = block.shared[at[..., None] + np.arange(size)].view(dtype)[..., 0].astype(np.float64)
        product = left @ right.T
        for j in range(p.n // 8):
            for half in range(2):
                row = g + 8 * half
                pair = [product[row, 8 * j + 2 * t + i] for i in range(2)]
                if p.into == "f16":
                    slots = [p.d[2 * j + half]]
                    if p.added:
                        old = self.flight[slots[0]]
                        pair = [v + SEMANTICS.half(old, i, np.float16).astype(np.float64) for i, v in enumerate(pair)]
                    lower, upper = (v.astype(np.float16).view(np.uint16).astype(np.uint32) for v in pair)
                    self.flight[slots[0]] = upper << np.uint32(16) | lower
                else:
                    for i in range(2):
                        slot = p.d[4 * j + 2 * half + i]
                        old = self.flight[slot].view(np.float32) if p.added else 0.0
                        self.flight[slot] = (pair[i] + old).astype(np.float32).view(np.uint32)

    def products_commit(self, mask) -> None:
        self.whole(mask)
        self.group += 1

    def products_wait(self, left: int, mask) -> None:
        self.whole(mask)
        done = [p for p in self.products if p.group < self.group - left]
        for p in done:
            self.multiplied(p)
        self.products = self.products[len(done) :]
        self.locked = {slot for p in self.products for slot in (*p.a, *p.d)}
        for slot in [slot for slot in self.flight if slot not in self.locked]:
            self.registers[slot] = self.flight.pop(slot)

    def multiply_some(self) -> None:
        """The first that was not multiplied yet."""
        for p in self.products:
            if not p.is_done:
                self.multiplied(p)
                return

    # -- going on

    def go(self, budget: int) -> None:
        """Run until the warp waits, or for so many instructions."""
        code, registers = self.block.program.code, self.registers
        while budget > 0:
            budget -= 1
            self.executed += 1
            if self.pcs is not None:
                self.pc = int(self.pcs.min())
                mask = self.pcs == self.pc
                if mask.all():
                    self.pcs = mask = None
            else:
                mask = None
            made = code[self.pc]
            kind = made.kind
            here = mask
            if made.predicate is not None:
                p = registers[made.predicate]
                if p is None:
                    raise Wrong(f"{made.text}: a predicate that was not set")
                p = p ^ made.is_negated if made.is_negated else p
                p = p if mask is None else p & mask
                if p.all():
                    here = None
                elif not p.any():
                    for slot in made.targets:  # what it would have written may be read where it does not matter
                        if registers[slot] is None and slot not in self.locked:
                            registers[slot] = self.garbage(slot)
                    self.next(mask)
                    continue
                else:
                    here = p
            try:
                if kind == "value":
                    self.put(made.targets[0], made.run(registers, self, here), here)
                elif kind == "effect":
                    made.run(registers, self, here)
                elif kind == "values":
                    for slot, value in zip(made.targets, made.run(registers, self, here), strict=True):
                        self.put(slot, value, here)
                elif kind == "bra":
                    if here is None:
                        self.pc = made.goal
                    elif mask is not None and (here == mask).all():
                        self.pcs[mask] = made.goal
                    else:
                        if self.pcs is None:
                            self.pcs = np.full(LANES, self.pc)
                        self.pcs[mask if mask is not None else slice(None)] = self.pc + 1
                        self.pcs[here] = made.goal
                    continue
                elif kind == "ret":
                    self.whole(here)
                    if any(self.copies) or self.products:
                        left = sum(map(len, self.copies)), len(self.products)
                        raise Wrong(f"a warp ends before its copies and products do: {left}")
                    self.state = "done"
                    return
                elif kind == "bar":
                    self.whole(here)
                    self.state = "bar"
                    self.next(mask)
                    return
                elif kind == "wait":
                    told, waits = made.run(registers, self, here)
                    if waits and self.refused == self.pc:  # it would go round and round
                        self.state, self.waits = "wait", waits
                        return
                    self.refused = self.pc if waits else None
                    self.put(made.targets[0], told, here)
                elif kind == "meet":
                    self.whole(here)
                    made.run(registers, self, here)
                    self.met += 1
                    self.next(mask)
                    if self.block.policy.meet:
                        self.state = "meet"
                        return
                    continue
            except Wrong as error:
                raise self.error(made, error) from error
            except (TypeError, AttributeError) as error:
                if "NoneType" in str(error):
                    raise self.error(made, "a register that was never written, or is wgmma's") from error
                raise self.error(made, repr(error)) from error
            self.next(mask)

    def next(self, mask) -> None:
        if self.pcs is None:
            self.pc += 1
        else:
            self.pcs[mask] += 1

    def error(self, made: Instruction, why) -> Wrong:
        return Wrong(f"block {self.block.at}, warp {self.number}, instruction {self.pc}: {made.text}\n  {why}")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a seed decides.

    Attributes:
      land: how probably a bulk copy comes when warps change; 0: when all wait.
      products: when products are multiplied: "now", "late" or "some".
      turn: instructions at most before another warp's.
      meet: whether the warps of a warpgroup wait for each other at each `wgmma`.
      favour: a warp that goes whenever it can, or is last.
    """

    land: float
    products: str
    turn: int
    meet: bool
    favour: int | None

    @classmethod
    def of(cls, random: np.random.Generator, num_warps: int) -> Policy:
        return cls(
            float(random.choice([0.0, 0.02, 0.3, 1.0])),
            str(random.choice(["now", "late", "some"])),
            int(random.choice([10, 100, 1000, 1 << 30])),
            bool(random.integers(2)) and num_warps % 4 == 0,
            None if random.integers(2) else int(random.integers(-num_warps, num_warps)),
        )


class Block:
    def __init__(self, program, memory, parameters, at, grid, num_warps, shared_bytes, random, policy=None):
        self.program, self.memory, self.parameters = program, memory, parameters
        self.at, self.grid, self.num_warps, self.random = at, grid, num_warps, random
        size = program.dynamic_at - SHARED_BASE + shared_bytes
        if size > 227 << 10:
            raise Wrong(f"{size} bytes of shared memory")
        self.shared = random.integers(0, 256, size, np.uint8)
        self.seen = np.full(size, EVERYONE, np.int16)
        self.generic = np.zeros(size, bool)
        self.barriers: dict[int, Barrier] = {}
        self.bulks: list[Bulk] = []
        self.policy = policy or Policy.of(random, num_warps)
        self.warps = [Warp(self, i) for i in range(num_warps)]

    def parameter(self, index: int, dtype):
        return np.full(LANES, self.parameters[index], dtype)

    def land(self) -> None:
        bulk = self.bulks.pop(int(self.random.integers(len(self.bulks))))
        self.shared[bulk.at], self.seen[bulk.at], self.generic[bulk.at] = bulk.data, EVERYONE, False
        bulk.barrier.bytes -= bulk.data.size
        bulk.barrier.settle()

    def can_go(self, warp: Warp) -> bool:
        if warp.state == "wait":
            return any(barrier.phase % 2 != parity for barrier, parity in warp.waits)
        if warp.state == "meet":
            first = warp.number // 4 * 4
            return all(other.met >= warp.met for other in self.warps[first : first + 4])
        return warp.state == "ready"

    def run(self) -> None:
        policy = self.policy
        while True:
            ready = [warp for warp in self.warps if self.can_go(warp)]
            if not ready:
                left = [warp for warp in self.warps if warp.state != "done"]
                if not left:
                    break
                if all(warp.state == "bar" for warp in left):
                    if len(left) < len(self.warps):
                        raise Wrong("some warps wait at a barrier and others are done")
                    for warp in left:
                        warp.synced(None, np.full(LANES, 0xFFFFFFFF, np.uint32))
                        for at in warp.dirty_block:
                            self.seen[at] = np.where(self.seen[at] == IN_FLIGHT, IN_FLIGHT, EVERYONE)
                        warp.dirty_block, warp.state = [], "ready"
                elif self.bulks:
                    self.land()
                else:
                    waits = {warp.number: (warp.state, self.program.code[warp.pc].text) for warp in left}
                    raise Wrong(f"block {self.at}: all warps wait: {waits}; {policy}; barriers {self.barriers}")
                continue
            if self.bulks and policy.land and self.random.random() < policy.land:
                self.land()
            warp = ready[int(self.random.integers(len(ready)))]
            if policy.favour is not None:
                favour = self.warps[policy.favour]
                if policy.favour >= 0 and favour in ready:
                    warp = favour
                elif policy.favour < 0 and warp is favour and len(ready) > 1:
                    warp = next(other for other in ready if other is not favour)
            warp.state = "ready"
            if policy.products == "some" and self.random.random() < 0.3:
                try:
                    warp.multiply_some()
                except Wrong as error:
                    raise Wrong(f"block {self.at}, warp {warp.number}: {error}; {policy}") from error
            warp.go(int(self.random.integers(1, policy.turn + 1)))
        if self.bulks:
            raise Wrong(f"block {self.at} ends before {len(self.bulks)} bulk copies have come; {policy}")


@dataclasses.dataclass
class Counts:
    blocks: int = 0
    instructions: int = 0


COUNTS = Counts()


def launch(program: Program, arguments, outs, grid, num_warps, shared_bytes, seed, policy=None) -> list[np.ndarray]:
    """The results of a kernel; arguments: numpy arrays; outs: (shape, dtype) of results, which follow them."""
    random = np.random.default_rng(seed)
    memory, parameters, results = Memory(), [], []
    for i, array in enumerate(arguments):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        parameters.append(memory.add(data, f"argument {i}", False))
    for i, (shape, dtype) in enumerate(outs):
        result = np.full(max(1, int(np.prod(shape))) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        results.append(result)
        parameters.append(memory.add(result, f"result {i}", True))
    parameters += [0] * (len(program.parameters) - len(parameters))
    grid = (*grid, 1, 1)[:3]
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    with np.errstate(all="ignore"):
        for at in blocks:
            block = Block(program, memory, parameters, at, grid, num_warps, shared_bytes, random, policy)
            block.run()
            COUNTS.blocks += 1
            COUNTS.instructions += sum(warp.executed for warp in block.warps)
    launch.fetched = memory.fetched
    launch.written = memory.written[-len(outs) :] if outs else []
    return [result.view(dtype).reshape(shape) for result, (shape, dtype) in zip(results, outs, strict=True)]


# ---- in the place of jax-triton --------------------------------------------------------------------------------------


class _Found(Exception):
    pass


@functools.cache
def compiled(kernel, arrays, outs, options):
    """`text_of` a kernel as what the interpreter runs: (its program, bytes of shared memory)."""
    text, shared = text_of(kernel, arrays, outs, options)
    return Program(text), shared


def text_of(kernel, arrays, outs, options) -> tuple[str, int]:
    """What jax-triton makes of a kernel for compute capability 9.0: (its PTX, bytes of shared memory).

    Args:
      arrays: (shape, dtype) of its arguments; outs: those of its results.
      options: the other arguments of `triton_call`, as items.
    """
    import jax

    found: list[Any] = []

    import jax_triton
    from jax_triton import triton_lib

    made = triton_lib.compile_ttir_to_ptx_inplace

    def compile_ttir(*arguments):
        found.append(made(*arguments))
        raise _Found

    out_shape = [jax.ShapeDtypeStruct(*out) for out in outs]
    call = lambda *arrays: jax_triton.triton_call(*arrays, kernel=kernel, out_shape=out_shape, **dict(options))
    with mock.patch.object(triton_lib, "compile_ttir_to_ptx_inplace", compile_ttir), contextlib.suppress(_Found):
        jax.jit(call).trace(*(jax.ShapeDtypeStruct(*array) for array in arrays)).lower(lowering_platforms=("cuda",))
    [one] = found
    ptx = one.binary
    return ptx.decode() if isinstance(ptx, bytes) else ptx, one.shared_mem_bytes


def compiler():
    """A context in which jax-triton compiles for compute capability 9.0, where no GPU is."""
    import jaxlib.gpu_triton as gpu_triton

    # What a plugin for GPUs has there, as far as it is asked for before a kernel is compiled.
    plugin = dict(get_compute_capability=lambda _: 90, get_serialized_metadata=None, get_arch_details=lambda _: "")
    return mock.patch.multiple(gpu_triton, create=True, **plugin)


@contextlib.contextmanager
def emulated(seed: int = 0, policy: Policy | None = None, check: Any = None):
    """In it the kernels of products and norms are run by the interpreter, one seed a launch."""
    import jax

    from jaxlora.kernels import nf4_matmul_wgmma, residual_norm

    seeds = iter(range(seed, 1 << 30))

    def triton_call(*arrays, kernel, out_shape, grid, num_warps=4, input_output_aliases=None, **options):
        outs = out_shape if isinstance(out_shape, list | tuple) else [out_shape]
        assert not input_output_aliases
        options = dict(options, grid=grid, num_warps=num_warps)
        of = tuple(tuple((a.shape, a.dtype) for a in each) for each in (arrays, outs))
        program, shared = compiled(kernel, *of, tuple(sorted(options.items())))
        grid = grid if isinstance(grid, tuple) else (grid,)

        def host(*arrays):
            arrays = [np.asarray(a) for a in arrays]
            of = [(o.shape, np.dtype(o.dtype)) for o in outs]
            results = launch(program, arrays, of, grid, num_warps, shared, next(seeds), policy)
            if check is not None:
                launch.name = kernel.fn.__name__
                check(launch)
            return tuple(results)

        results = jax.pure_callback(host, tuple(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outs), *arrays)
        return list(results) if isinstance(out_shape, list | tuple) else results[0]

    with (
        compiler(),
        mock.patch.object(nf4_matmul_wgmma, "triton_call", triton_call),
        mock.patch.object(residual_norm, "triton_call", triton_call),
    ):
        yield
