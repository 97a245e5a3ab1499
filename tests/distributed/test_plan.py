"""The simulator: its bytes are those that ranks send, its figures those worked out by hand, and it says what is a model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from attentions import filled
from meshes import counted
from processes import run
from typer.testing import CliRunner

from attnfuse.cli import app
from attnfuse.distributed import Model, Plan, plan
from attnfuse.distributed.command import ranks_of, tokens_of
from attnfuse.distributed.links import links_of

SMALL = Model(layers=3, heads=4, kv_heads=2, head_size=8, hidden=32, intermediate=64, vocab=100, dtype="float32")
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


def _sent(shape, layout, algorithm, ranks, kernel):
    [(spec, _)] = shape.attentions(26, 2)
    return counted(filled(spec), layout, algorithm, ranks, kernel)


@pytest.mark.parametrize("ranks", [(4,), (2, 2)])
def test_planned_bytes_are_those_that_ranks_send(ranks):
    for mask in ("causal", "window"):
        shape = Model(**{**vars(SMALL), "mask": mask, "window": 5})
        for algorithm, heads in (("ring", 1), ("gather", 1), ("ulysses_ring", 2)):
            if algorithm == "ulysses_ring" and len(ranks) == 1:
                continue
            found = plan(shape, tokens=26, batch=2, ranks=ranks, device="cpu", algorithm=algorithm, heads=heads)
            [layers] = found.layers
            sent = run(_sent, 4, shape, found.layout, algorithm, ranks, "cpu")
            of_ranks = [(sum(forward), sum(backward)) for _, forward, backward in sent]
            account = layers.account
            assert of_ranks == [(a.total, b.total) for a, b in zip(account.forward, account.backward)]
            assert max(map(sum, of_ranks)) == layers.forward.total + layers.backward.total
            assert found.bytes_sent == 3 * max(map(sum, of_ranks))
            assert max(error for error, _, _ in sent) < 1e-5


def test_figures_by_hand():
    found = plan(SMALL, tokens=4096, ranks=4, batch=2, layout="zigzag", algorithm="ring")
    # a layer of q and o, k and v, an MLP of three, two norms; two embeddings and a norm
    parameters = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 2 * 100 * 32 + 32
    assert found.model.counted_parameters == parameters
    assert found.rows == 1024
    rows = 1024 * 2
    memory = found.memory
    assert (memory.parameters, memory.gradients) == (4 * parameters, 4 * parameters)
    assert memory.kv == 3 * rows * 2 * 16 * 4
    assert memory.activations == 3 * rows * (4 * (4 * 32 + 2 * 32 + 3 * 64) + 8 * 4)
    assert memory.logits == rows * 100 * 8 + 4096 * 2 * 100 * 4
    assert memory.transit == 2 * rows * 2 * 16 * 8
    assert memory.total == sum(vars(memory).values())
    # three hops of keys and values; in backward with their gradients
    hop = rows * 2 * 16 * 4
    [layers] = found.layers
    assert (layers.forward.total, layers.backward.total) == (3 * hop, 6 * hop)
    assert found.edges.gradients == 2 * 3 * (parameters // 4) * 4 and found.edges.logits == 3 * rows * 100 * 4
    # tiles of 128: of 32 x 32 those on and below the diagonal
    steps = layers.account.steps
    assert sum(sum(step.tiles) for step in steps) == 32 * 33 // 2
    assert layers.account.waits == 132


def test_times_are_the_slower_of_a_product_and_a_transfer():
    links = links_of("cuda")
    found = plan(Model(), tokens=2**17, ranks=8)
    [layers] = found.layers
    products = 2 * 128**2 * 32 * 2 * 128 / (links.flops / 2)
    hop = 2**14 * 8 * 2 * 128 * 2 / links.within + links.latency
    first = layers.account.steps[0]
    assert first.compute == pytest.approx(first.waits * products) and first.transfer == pytest.approx(hop)
    assert layers.seconds[0] == pytest.approx(sum(max(step.compute, step.transfer) for step in layers.account.steps))
    # links a thousand times slower: transfers alone count
    slow = plan(Model(), tokens=2**17, ranks=8, links=links_of("cuda").__class__(4.5e6, 4.5e6, 0, 0, 989e12, 8, "slow"))
    [of_slow] = slow.layers
    last = of_slow.account.steps[-1]
    assert of_slow.seconds[0] == pytest.approx(7 * (2**14 * 8 * 2 * 128 * 2 / 4.5e6) + last.compute)


def test_a_million_tokens_on_128_devices():
    for ranks in (128, (16, 8)):
        found = plan(Model.from_config(LLAMA), tokens=2**20, ranks=ranks)
        [layers] = found.layers
        assert found.layout == "zigzag" and found.rows == 8192 and len(layers.account.steps) == 128
        side = 2**20 // layers.account.tile
        assert sum(sum(step.tiles) for step in layers.account.steps) == side * (side + 1) // 2
        text = str(found)
        assert "Seconds and memory are a model, not measured" in text and "are counted by the code" in text
    narrow = plan(Model(mask="window", window=4096), tokens=2**20, ranks=(16, 8), heads=8)
    assert narrow.layout == "contiguous" and narrow.layers[0].account.algorithm == "ulysses_ring"
    assert len(narrow.layers[0].account.steps) == 2
    # keys and values of 8192 rows go one hop, and in backward with their gradients back
    hop = 8192 * 8 * 2 * 128
    for ranks, hops in ((128, (1, 0)), ((16, 8), (1, 1))):
        [layers] = plan(Model(mask="window", window=4096), tokens=2**20, ranks=ranks).layers
        assert layers.account.algorithm == "ring" and layers.account.layout == "contiguous"
        assert layers.forward == tuple(2 * hop * x for x in hops) and layers.backward == tuple(
            6 * hop * x for x in hops
        )


def test_without_gradients_and_with_checkpoints():
    trained = plan(SMALL, tokens=4096, ranks=4)
    inference = plan(SMALL, tokens=4096, ranks=4, trains=False, outputs="own")
    again = plan(SMALL, tokens=4096, ranks=4, checkpointing=True)
    assert inference.memory.gradients == inference.edges.gradients == inference.layers[0].backward.total == 0
    assert inference.edges.logits == 0 and inference.memory.logits == 1024 * 100 * 4
    assert inference.memory.kv == trained.memory.kv
    assert again.memory.activations < trained.memory.activations
    assert "backward" not in str(inference)


def test_one_rank_sends_nothing():
    found = plan(SMALL, tokens=1000, ranks=1)
    assert found.bytes_sent == 0 and found.edges.gradients == found.edges.logits == 0 and found.memory.transit == 0


# -- configs


def test_configs_by_the_usual_names():
    assert Model.from_config(LLAMA) == Model()
    assert Model().counted_parameters == 8_030_261_248
    gpt2 = Model.from_config({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257})
    assert (gpt2.layers, gpt2.kv_heads, gpt2.head_size, gpt2.intermediate) == (12, 12, 64, 3072)
    assert not gpt2.gated and gpt2.mask == "causal"
    bert = {**LLAMA, "model_type": "bert", "hidden_act": "gelu", "num_key_value_heads": None}
    assert Model.from_config(bert).mask == "none" and Model.from_config(bert).kv_heads == 32
    assert Model.from_config({**LLAMA, "sliding_window": 4096}).window == 4096
    unused = Model.from_config({**LLAMA, "sliding_window": 4096, "use_sliding_window": False})
    assert unused.mask == "causal" and unused.window is None
    assert Model.from_config({"text_config": LLAMA, "vision_config": {}}) == Model()
    assert Model.from_config(LLAMA, mask="documents").mask == "documents"


def test_experts_shared_key_heads_and_windows_on_both_sides():
    mixtral = Model.from_config({**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000})
    assert (mixtral.experts, mixtral.active) == (8, 2)
    assert 46e9 < mixtral.counted_parameters < 47e9
    falcon = {**LLAMA, "num_key_value_heads": None, "multi_query": True, "num_kv_heads": 32}
    assert Model.from_config(falcon).kv_heads == 1
    assert Model.from_config({**falcon, "new_decoder_architecture": True, "num_kv_heads": 8}).kv_heads == 8
    kinds = ["full_attention", "sliding_attention"] * 16
    encoder = Model.from_config({**LLAMA, "model_type": "modernbert", "sliding_window": 64, "layer_types": kinds})
    full, near = (layers.account for layers in plan(encoder, tokens=4096, ranks=4).layers)
    # tiles of 128: 32 in a row, and a neighbour on each side
    assert full.waits * 4 == 32 * 32 and sum(sum(step.tiles) for step in near.steps) == 32 * 3 - 2


def test_layers_with_different_masks_have_one_layout():
    kinds = ["sliding_attention"] * 20 + ["full_attention"] * 12
    model = Model.from_config({**LLAMA, "sliding_window": 1024, "layer_types": kinds})
    found = plan(model, tokens=2**16, ranks=8)
    assert [layers.count for layers in found.layers] == [20, 12]
    assert found.layout == "zigzag"
    assert all(layers.account.layout == "zigzag" for layers in found.layers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 5}, "do not share 5"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
    ],
)
def test_configs_that_lack_something(change, said):
    with pytest.raises(ValueError, match=said):
        Model.from_config({**LLAMA, **change})


def test_what_cannot_be_planned():
    for more, said in (
        ({"tokens": 0}, "needs tokens"),
        ({"outputs": "none"}, "'whole' or 'own'"),
        ({"layout": "spiral"}, "a layout is"),
    ):
        with pytest.raises(ValueError, match=said):
            plan(SMALL, **{"tokens": 64, "ranks": 4, **more})
    with pytest.raises(ValueError, match="number of keys"):
        Model(mask="window")
    with pytest.raises(ValueError, match="a mask is"):
        Model(mask="square")
    with pytest.raises(ValueError, match="2 windows for 32 layers"):
        Model(windows=(None, 3))


@pytest.mark.models
def test_a_config_of_transformers():
    from transformers import LlamaConfig

    config = LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
    assert Model.from_config(config, dtype="bfloat16") == Model()


def test_a_config_is_read_without_transformers(tmp_path):
    """By `python -m attnfuse` in a process of its own, of which it is known what it imports."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = [sys.executable, "-X", "importtime", "-m", "attnfuse", "plan", str(tmp_path), "--tokens=1k", "--ranks=2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not any(name.split(".")[0] == "transformers" for name in imported)
    assert "1,024 tokens, batch 1, on 2 ranks of cuda" in done.stdout


# -- the command


def test_the_command_prints_tables_and_data(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    given = ["plan", str(tmp_path), "--tokens", "32k", "--ranks", "2x4", "--between", "25", "--layers", "2"]
    table = CliRunner().invoke(app, given)
    assert table.exit_code == 0, table.output
    assert "32,768 tokens, batch 1, on 2 x 4 ranks of cuda" in table.output
    assert "between as given" in table.output
    data = json.loads(CliRunner().invoke(app, [*given, "--json"]).output)
    assert data["tokens"] == 32768 and data["model"]["layers"] == 2 and data["links"]["between"] == 25e9
    assert data["bytes_sent"] == 2 * sum(sum(data["layers"][0][which]) for which in ("forward", "backward"))


def test_the_command_says_what_is_wrong(tmp_path):
    for given, said in (
        (["--tokens", "many", "--ranks", "4"], "no number of tokens"),
        (["--tokens", "32k", "--ranks", "2x2x2"], "no mesh"),
        (["--tokens", "32k", "--ranks", "4", "--share", "3"], "does not divide"),
        (["--tokens", "32k", "--ranks", "5", "--share", "5"], "cannot be dealt|can be dealt"),
        ([str(tmp_path / "none.json"), "--tokens", "32k", "--ranks", "4"], "none.json"),
    ):
        found = CliRunner().invoke(app, ["plan", *given])
        assert found.exit_code == 2
        assert any(part in found.output for part in said.split("|")), found.output


def test_numbers_as_they_are_typed():
    assert [tokens_of(x) for x in ("32768", "128k", "1M", "1_000", "2,048")] == [32768, 131072, 2**20, 1000, 2048]
    assert [ranks_of(x) for x in ("8", "16x8", "16 X 8")] == [(8,), (16, 8), (16, 8)]
    for wrong in ("", "0", "-3", "1.5M"):
        with pytest.raises(ValueError):
            tokens_of(wrong)


def test_data_hold_all_that_the_text_says():
    found = plan(SMALL, tokens=512, ranks=(2, 2))
    assert isinstance(found, Plan)
    data = json.loads(json.dumps(found.as_dict()))
    assert data["memory"]["total"] == found.memory.total
    assert math.isclose(data["seconds"], found.seconds)
