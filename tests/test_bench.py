"""`jaxlora bench` on the CPU, with PEFT really running beside, and what is made of its rows."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from jaxlora import cli, quant
from jaxlora.bench import device, step, table
from jaxlora.bench.checkpoints import write_checkpoint
from jaxlora.bench.shapes import CONFIGS, Work, random_model, weights_of
from jaxlora.bench.step import mode_of
from jaxlora.config import QuantConfig
from jaxlora.converters.huggingface import model_config
from jaxlora.layers import Linear, PlainLinear
from jaxlora.model import CausalLM, named_nodes
from jaxlora.moe import ExpertLinear
from jaxlora.remat import POLICIES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
JAXLORA = Path(sys.executable).parent / "jaxlora"


def run(*arguments, **environment):
    """The result of a command line in a process of its own, on the CPU."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [str(JAXLORA), "bench", *map(str, arguments)], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a whole run of a tiny shape printed, and its folder."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    few = ["--work", "tiny-2x64", "--policies", "offload", "auto", "--steps", 3, "--commit", "abc1234"]
    result = run(*few, "--output", folder)
    assert result.returncode == 0, result.stderr
    return result, folder


def rows_of(folder, kind):
    (path,) = folder.glob(f"*-cpu-{kind}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_a_row_for_each_policy(measured):
    offload, auto = rows_of(measured[1], "step")
    assert (offload["policy"], offload["mode"]) == ("offload", "memory")
    assert (auto["policy"], auto["mode"]) == ("projections", "speed")  # the first that fits
    for row in (offload, auto):
        assert row["work"] == "tiny-2x64" and row["device"] == "cpu" and row["commit"] == "abc1234"
        assert row["tok_s"] == pytest.approx(2 * 64 / (row["ms"] / 1e3), rel=0.02)
        assert row["gib"] is None and row["mfu"] is None  # which a CPU does not say, and has no peak for
        assert row["loss_last"] < row["loss_first"] and abs(row["loss_first"] - np.log(512)) < 0.1
        assert {"date", "compile_s", "load_s", "temp_gib", "args_gib", "host_temp_gib"} <= row.keys()
        assert {"jax", "jaxlib", "flax", "optax", "torch", "peft", "bitsandbytes"} <= row["versions"].keys()


def test_peft_ran_beside_and_unsloth_is_said_to_be_missing(measured):
    result, folder = measured
    assert all(row["peft_tok_s"] > 0 and "unsloth_tok_s" not in row for row in rows_of(folder, "step"))
    assert "unsloth does not run beside: " in result.stderr and "has no unsloth" in result.stderr


def test_the_kernels_are_measured_at_the_shape(measured):
    rows = rows_of(measured[1], "kernels")
    assert {row["op"] for row in rows} == {
        "copy", "product", "dequantize_nf4", "merge_nf4", "matmul_nf4", "matmul_dense", "matmul", "attention",
        "cross_entropy",
    }  # fmt: skip
    shapes = {tuple(row["shape"]) for row in rows if row["op"] == "dequantize_nf4"}
    assert shapes == {(128, 128), (64, 128), (256, 128), (128, 256)}
    assert all(row["implementation"] == "reference" for row in rows if row["op"] == "dequantize_nf4")
    (attention, _) = [row for row in rows if row["op"] == "attention"]
    assert attention["tflop_s"] == pytest.approx(2 * 64**2 * 128 / attention["ms"] / 1e9, abs=1e-3)


def test_the_printed_table_has_the_rows(measured):
    result, folder = measured
    for row in rows_of(folder, "step"):
        assert f'| tiny-2x64 | "{row["policy"]}" | {row["tok_s"]:,} |  |  | {row["peft_tok_s"]:,}: ' in result.stdout
    assert "| dequantize_nf4 | reference | 128x256 |" in result.stdout
    assert "no peak is known of 'cpu'" in result.stdout and str(folder) in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--work", "9b-4x2048"], "there is no shape '9b'; there are tiny, 135m, "),
        (["--work", "8b-4x"], "'8b-4x' is not SHAPE-BATCHxTOKENS, such as 8b-4x2048"),
        (["--work", "tiny-0x64"], "is not SHAPE-BATCHxTOKENS"),
        (["--policies", "most"], "use_gradient_checkpointing='most' is not one of"),
        (["--steps", "2"], "steps must be at least 3"),
        (["--peers", "axolotl"], "peers ['axolotl']: there are unsloth, peft, or none"),
        (["--host-gib", "-1"], "host_gib must be 0 or more, found -1"),
        (["--matmul-dtype", "int4"], "matmul_dtype is 'int4': it can be 'fp8'"),
        ([], "8b-4x2048 need an NVIDIA GPU, and JAX finds only 'cpu' here"),
        (["--table-file", "nothing.md"], "nothing.md"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["bench", "--output", str(tmp_path / "results"), *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and expected in err
    assert not (tmp_path / "results").exists()


def test_a_failure_ends_nothing_else(tmp_path):
    few = ["--work", "tiny-1x8", "--no-kernels", "--steps", 3, "--output", tmp_path, "--policies", "full"]
    result = run(*few, "--peer-python", shutil.which("false"))
    assert result.returncode == 0 and "peers of tiny failed: exit code 1" in result.stderr
    assert not any("peft" in name for row in rows_of(tmp_path, "step") for name in row)


def test_works_of_one_shape_share_a_process_of_the_peer_and_may_be_in_float8(tmp_path):
    few = ["--work", "tiny-1x8", "tiny-2x16", "--no-kernels", "--steps", 3, "--output", tmp_path, "--policies", "full"]
    result = run(*few, "--peers", "peft", "--matmul-dtype", "fp8")
    assert result.returncode == 0 and result.stderr.count("tiny in peft: measured in") == 1, result.stderr
    first, second = rows_of(tmp_path, "step")
    assert first["matmul_dtype"] == second["matmul_dtype"] == "fp8" and first["peft_tok_s"] != second["peft_tok_s"]
    assert '| "full", fp8 |' in result.stdout


def test_a_bound_of_the_host_reaches_the_model(monkeypatch):
    models = []
    monkeypatch.setattr(step, "random_model", lambda *args: models.append(random_model(*args)) or models[-1])
    row = step.measure(Work.parse("tiny-1x8"), "offload", 3, host_gib=0.25)
    assert row["loss_last"] < row["loss_first"] and models[0].host_bytes == 1 << 28 and row["host_gib"] == 0.25


def test_a_device_that_cannot_be_had_is_one_line(tmp_path):
    result = run("--work", "tiny-1x8", "--output", tmp_path / "results", JAX_PLATFORMS="abacus")
    assert result.returncode == 1 and not (tmp_path / "results").exists()
    assert result.stderr.count("\n") == 1 and "abacus" in result.stderr


@pytest.mark.slow
def test_the_scripts_beside_it_run(tmp_path):
    """One line of `loading.py`, three of `cold_start.py`, whose later processes compile nothing."""
    lines = {}
    for name, arguments in (("loading", ["tiny"]), ("cold_start", ["tiny-2x64"])):
        command = [sys.executable, "-P", ROOT / "benchmarks" / f"{name}.py", *arguments, "--folder", tmp_path]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        assert result.returncode == 0, result.stderr
        lines[name] = [json.loads(line) for line in result.stdout.splitlines()]
    (loading,) = lines["loading"]
    assert loading["cold_rss_anon_gib"] > 0 and loading["warm_rss_anon_gib"] > 0
    assert loading["bandwidth_gb_s"].keys() == {"read_cold", "read_warm", "pageable", "sent", "quantised"}
    cold, *warm = lines["cold_start"]
    assert sum(cold["compiled"].values()) > 20 and cold["compiled"]["compile"] == 1 and len(warm) == 2
    assert all(set(row["compiled"].values()) == {0} and row["loss"] == cold["loss"] for row in warm)


@pytest.mark.slow
def test_a_long_row_goes_on_from_its_saved_adapter(tmp_path):
    losses = []
    for is_resumed in (False, True):
        arguments = ["tiny-1x256", "--steps", "2", "--policy", "offload", "--adapter", tmp_path / "adapter"]
        command = [sys.executable, "-P", ROOT / "benchmarks" / "long_context.py", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        assert result.returncode == 0, result.stderr
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [row["resumed"] for row in rows] == [is_resumed] * 2
        losses += [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


# ---- What a step must compute


def test_flop_are_those_of_the_published_parameter_counts():
    """8,030,261,248 weights of Llama-3.1-8B, less the embedding and 65 norms; 41,943,040 of adapters of rank 16."""
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    expected = 4 * weights + 6 * 41_943_040 + 6 * 32 * 4096 * 2048
    assert Work.parse("8b-4x2048").flop_per_token() == expected
    tied = 1_235_814_400 - 33 * 2048  # Llama-3.2-1B, whose head is its embedding
    assert Work.parse("1b-8x2048").flop_per_token() == 4 * tied + 6 * 11_272_192 + 6 * 16 * 2048 * 2048


@pytest.mark.parametrize("shape", CONFIGS)
def test_a_token_goes_through_the_matrices_of_the_model(shape):
    """Those of the model itself, of experts as many as are chosen; and adapters on each linear but experts, the router
    and what Mamba's scan makes."""
    config = model_config(CONFIGS[shape])
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    weights = adapted = 0
    for named in named_nodes(model, (Linear, ExpertLinear, PlainLinear)):
        if named.node is model.lm_head:
            continue
        size = math.prod(named.node.weight.get_value().shape)
        is_expert = isinstance(named.node, ExpertLinear)
        weights += size * config.num_experts_per_tok // config.num_experts if is_expert else size
        if isinstance(named.node, Linear):
            adapted += len(named.layers) * 16 * (named.node.in_features + named.node.out_features)
    weights += config.hidden_size * config.vocab_size
    work = Work.parse(f"{shape}-2x64")
    assert work.name == f"{shape}-2x64"
    attending = len(config.layer_types) - config.layer_types.count("linear_attention")
    heads = config.num_attention_heads * CONFIGS[shape]["head_dim"] * attending
    assert work.flop_per_token() == 4 * weights + 6 * adapted + 6 * heads * 64


def test_linear_attention_is_counted_by_its_linears():
    """Of Qwen3.5-9B: 24 layers of qkv, gate, steps and decays, and out; 8 of queries with gates, keys, values, out."""
    linear = 4096 * (2 * 16 * 128 + 32 * 128 + 4096 + 2 * 32 + 4096)
    full = 4096 * (2 * 4096 + 2 * 1024 + 4096)
    weights = 24 * linear + 8 * full + 32 * 3 * 4096 * 12288 + 4096 * 248320
    assert weights_of("qwen3.5-9b") == weights
    few, many = (Work.parse(f"qwen3.5-9b-1x{tokens}").flop_per_token() for tokens in (64, 4096))
    assert many - few == 6 * 4096 * 8 * (4096 - 64)


def test_of_a_window_the_last_tokens_are_seen():
    """Windows of 128 in 12 of 24 layers: of 4096 tokens 126 on average, where whole layers see 2048."""
    both = (Work.parse(f"gpt-oss-20b-1x{tokens}").flop_per_token() for tokens in (64, 4096))
    assert -np.subtract(*both) == 6 * 4096 * 12 * (4096 + 2 * 126 - 2 * 64)


def test_experts_are_drawn_each_on_its_own(monkeypatch):
    small = dict(
        hidden_size=64,
        moe_intermediate_size=64,
        num_experts=3,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        vocab_size=32,
        head_dim=16,
    )
    monkeypatch.setitem(CONFIGS, "small", CONFIGS["qwen3-30b-a3b"] | small)
    model = random_model("small", QuantConfig(), jnp.float32)
    [down] = [n.node for n in named_nodes(model, ExpertLinear) if n.name.endswith("down_proj")]
    experts = np.asarray(quant.dequantize(down.weight.get_value())).reshape(6, 64, 64)
    assert len({expert.tobytes() for expert in experts}) == 6
    assert np.std(experts, axis=(1, 2)) == pytest.approx([0.02] * 6, rel=0.05)


def test_peaks_by_the_kinds_that_devices_call_themselves():
    assert device.peak_tflop_s("NVIDIA H100 80GB HBM3") == device.peak_tflop_s("NVIDIA H200") == 989
    assert device.peak_tflop_s("NVIDIA H100 PCIe") == 756 and device.peak_tflop_s("NVIDIA A100-SXM4-80GB") == 312
    assert device.peak_tflop_s("NVIDIA GeForce GT 710") is None
    assert device.short_name("NVIDIA H100 80GB HBM3") == "h100" and device.short_name("NVIDIA X 1") == "nvidia-x-1"


def test_every_policy_has_a_mode():
    modes = {policy: mode_of(policy) for policy in POLICIES}
    in_memory = {policy for policy, mode in modes.items() if mode == "memory"}
    assert in_memory == {"full", "offload", "offload_attention", "offload_residual"}


def test_the_checkpoint_of_the_peers_is_one_of_bitsandbytes(tmp_path):
    write_checkpoint(tmp_path, "tiny", "nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.is_loaded_in_4bit and type(model.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"]
    assert json.loads((tmp_path / "config.json").read_text()).items() >= CONFIGS["tiny"].items()


# ---- Tables

ROW = dict(
    work="8b-4x2048", mode="memory", policy="offload", tok_s=12000, gib=7.5, device="NVIDIA H100", date="2026-11-25"
)


def test_the_newest_row_stands():
    rows = [
        ROW | dict(tok_s=3),
        ROW,
        ROW | dict(tok_s=99999, superseded="by another form"),
        {k: v for k, v in ROW.items() if k != "mode"} | dict(tok_s=99999),
        ROW | dict(policy="projections", tok_s=16000),
        ROW | dict(work="1b-8x2048", tok_s=60000),
        ROW | dict(device="NVIDIA A100", tok_s=4000),
        ROW | dict(work="8b-1x8192", tok_s=9000, unsloth_tok_s=8000),
        ROW | dict(work="8b-1x8192", tok_s=9500),
        ROW | dict(work="8b-1x8192", tok_s=9700, host_gib=1.5),
    ]
    assert [row["tok_s"] for row in table.standing(rows)] == [4000, 12000, 16000, 9000, 9700, 60000]
    assert '"offload", at most 1.5 GiB on the host | 9,700 |' in "\n".join(table.steps(rows))


def test_a_ratio_stands_only_where_both_ran():
    beside = ROW | dict(unsloth_tok_s=10000, unsloth_gib=8.0)
    lines = table.steps([beside, ROW | dict(policy="full", gib=None)])
    assert "Unsloth in the same run" in lines[0] and "PEFT" not in lines[0]
    assert "| 39% | 7.5 | 10,000: 1.20x, 8.0 GiB: 0.94x |" in lines[2]
    assert "| 39% |  |  |" in lines[3]


def test_the_readme_has_the_rows_of_the_results(tmp_path):
    """`jaxlora bench --table-file README.md` after new rows."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    table.update(tmp_path / "README.md", tmp_path / "benchmarks" / "results")
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    drawn = (tmp_path / "benchmarks" / "results" / table.PLOT).read_bytes()
    table.update(tmp_path / "README.md", tmp_path / "benchmarks" / "results")
    assert (tmp_path / "benchmarks" / "results" / table.PLOT).read_bytes() == drawn
    for row in table.standing(table.read(RESULTS)):
        assert row["work"] in drawn.decode() or row.get("gib") is None


def test_a_document_without_the_marks_is_left_alone(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("# A\n")
    with pytest.raises(ValueError, match="it has not both"):
        table.update(document, RESULTS)
    document.write_text(f"{table.BEGIN}\n{table.END}\n")
    with pytest.raises(FileNotFoundError, match="no \\*step.jsonl"):
        table.update(document, tmp_path)
    assert document.read_text() == f"{table.BEGIN}\n{table.END}\n"
