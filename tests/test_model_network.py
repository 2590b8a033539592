"""The policy network: influence between tokens, masking, shapes, sizes and errors."""

import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import pytest

from octolike.config import ConfigError
from octolike.model.network import build_network
from octolike.types import flatten, zeros

GOLDEN_TREE = Path(__file__).parent / "golden" / "model_tree.txt"
SPEC = fakes.spec()
SEEN = ("image_primary", "image_wrist", "proprio")
OWN = ("readout_action", "readout_other")


@pytest.fixture(scope="module")
def model():
    return build_network(fakes.model(), SPEC, fakes.NAMES)


@pytest.fixture(scope="module")
def variables(model):
    return fakes.parameters(model.init, zeros(SPEC, 1), train=False)


@pytest.fixture(scope="module")
def encode(model, variables):
    @jax.jit
    def run(observation, task):
        groups = model.apply(variables, observation, task, train=False, method="encode")
        return {name: group.tokens for name, group in groups.items()}

    return run


@pytest.fixture(scope="module")
def influence(model, variables):
    """Return {reader: {source: [W of reader, W of source]}}: sizes of gradients, 0: none."""
    b = fakes.batch(SPEC, 1)
    sources = {n: variables["params"][f"{n}_pos_embedding"] for n in OWN}
    for key in SEEN:
        sources[key] = b["observation"][key].astype(np.float32)

    def read(sources):
        params = variables["params"] | {f"{n}_pos_embedding": sources[n] for n in OWN}
        observation = b["observation"] | {key: sources[key] for key in SEEN}
        groups = model.apply(
            {"params": params}, observation, b["task"], train=False, method="encode"
        )
        # A random weighting: the plain sum of a normalised token is constant.
        weight = jax.random.normal(jax.random.key(2), (model.width,))
        return {name: (g.tokens @ weight)[0].sum(axis=-1) for name, g in groups.items()}

    shapes = jax.eval_shape(read, sources)
    readers = {name: np.zeros(x.shape, np.float32) for name, x in shapes.items()}
    pull = jax.jit(lambda cotangent: jax.vjp(read, sources)[1](cotangent)[0])
    table = {}
    for name, zero in readers.items():
        rows = []
        for unit in np.eye(zero.size, dtype=np.float32):
            gradient = pull(readers | {name: unit.reshape(zero.shape)})
            rows.append(
                {k: np.abs(v[0]).reshape(v.shape[1], -1).sum(-1) for k, v in gradient.items()}
            )
        table[name] = {k: np.stack([row[k] for row in rows]) for k in sources}
    return table


def test_later_timesteps_do_not_influence_earlier_ones(influence):
    for reader in ("obs_primary", "obs_wrist", "obs_proprio", *OWN):
        for source in SEEN:
            assert influence[reader][source][0, 1] == 0, f"{reader} at t=0 sees {source} at t=1"
            assert (influence[reader][source][[0, 1, 1], [0, 0, 1]] > 0).all(), (reader, source)


def test_readouts_influence_only_themselves(influence):
    for reader, sources in influence.items():
        for readout in OWN:
            if reader == readout:
                assert sources[readout][0, 1] == 0
                assert (sources[readout][[0, 1, 1], [0, 0, 1]] > 0).all()
            else:
                assert not sources[readout].any(), f"{reader} is influenced by {readout}"


def test_observations_do_not_influence_task_tokens(influence):
    for source in SEEN:
        assert not influence["task_language"][source].any()


def change(x: np.ndarray) -> np.ndarray:
    return (fakes.VOCABULARY - x) if x.dtype == np.int32 else (x + 77).astype(x.dtype)


ABSENT = {
    "camera": ("observation.present.image_wrist", "observation.image_wrist"),
    "proprio": ("observation.present.proprio", "observation.proprio"),
    "goal image": ("task.present.image_primary", "task.image_primary"),
    "instruction": ("task.present.language", "task.language.ids"),
    "padded words": ("task.language.mask", "task.language.ids"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_absent_inputs_do_not_matter(case, encode):
    flag, value = ABSENT[case]
    present = fakes.batch(SPEC, 2)
    absent, changed = copy.deepcopy(present), copy.deepcopy(present)
    dict(flatten(absent))[flag][:] = False
    dict(flatten(changed))[flag][:] = False
    leaf = dict(flatten(changed))[value]
    leaf[:] = change(leaf)
    full, reference, result = (
        encode(b["observation"], b["task"]) for b in (present, absent, changed)
    )
    for readout in ("readout_action", "readout_other"):
        np.testing.assert_array_equal(reference[readout], result[readout])
        assert np.abs(full[readout] - reference[readout]).max() > 1e-4, "its presence should matter"


def test_a_padded_timestep_does_not_matter(encode):
    b = fakes.batch(SPEC, 2)
    b["observation"]["timestep_mask"][:, 0] = False
    before = encode(b["observation"], b["task"])
    for key in ("image_primary", "image_wrist", "proprio"):
        b["observation"][key][:, 0] = change(b["observation"][key][:, 0])
    after = encode(b["observation"], b["task"])
    for name in ("obs_primary", "obs_proprio"):
        np.testing.assert_array_equal(before[name][:, 1], after[name][:, 1])
    # Not even the readout of the padded timestep attends to it.
    np.testing.assert_array_equal(before["readout_action"], after["readout_action"])


def test_examples_do_not_influence_one_another(encode):
    b, other_batch = fakes.batch(SPEC, 2), fakes.batch(SPEC, 2, seed=1)
    mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:]]), b, other_batch)
    alone, together = (
        encode(b["observation"], b["task"]),
        encode(mixed["observation"], mixed["task"]),
    )
    for name in alone:
        np.testing.assert_array_equal(alone[name][0], together[name][0])


def test_float_images_mean_the_same_as_uint8(model, variables, encode):
    b = fakes.batch(SPEC, 2)
    uint8 = encode(b["observation"], b["task"])
    for key in ("image_primary", "image_wrist"):
        b["observation"][key] = b["observation"][key].astype(np.float32)
    float32 = encode(b["observation"], b["task"])
    np.testing.assert_allclose(uint8["readout_action"], float32["readout_action"], atol=1e-6)


@pytest.fixture(scope="module")
def loss(model, variables):
    traces = []

    @jax.jit
    def run(batch):
        traces.append(1)
        rngs = {"noise": jax.random.key(3), "dropout": jax.random.key(4)}
        return model.apply(variables, batch, train=True, rngs=rngs)

    run.traces = traces
    return run


def test_loss_ignores_masked_actions(loss):
    b = fakes.batch(SPEC, 3)
    b["action_mask"][0, :, 1:] = False
    b["action_mask"][1, :, :, 2] = False
    b["action_mask"][2] = False
    before, metrics = loss(b)
    b["action"] = np.where(b["action_mask"], b["action"], np.float32(4.0))
    after, _ = loss(b)
    assert float(before) == float(after)
    assert float(metrics["loss_per_example"][2]) == 0


def test_loss_is_the_mean_over_valid_actions(loss):
    b = fakes.batch(SPEC, 3)
    b["action_mask"][0, :, 1:] = False
    b["observation"]["timestep_mask"][1, 0] = False
    b["action_mask"][2] = False
    total, metrics = loss(b)
    # example 0 has half of its actions, example 1 half of its timesteps, example 2 nothing
    expected = metrics["loss_per_example"][:2].mean()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(total, metrics["action_loss"] + metrics["other_loss"], rtol=1e-6)


def test_the_loss_of_a_batch_without_valid_actions_is_zero(loss):
    b = fakes.batch(SPEC, 3)
    b["action_mask"][:] = False
    assert float(loss(b)[0]) == 0


def test_loss_is_traced_once(loss):
    loss(fakes.batch(SPEC, 3))
    before = len(loss.traces)
    loss(fakes.batch(SPEC, 3, seed=5))
    assert len(loss.traces) == before


def test_sampled_actions_depend_on_the_noise_only(model, variables):
    b = fakes.batch(SPEC, 2)
    run = jax.jit(
        lambda observation, dims, key: model.apply(
            variables,
            observation,
            b["task"],
            dims=dims,
            rngs={"noise": key},
            method="sample_actions",
        )
    )
    dims = np.array([[True, True, True], [True, True, False]])
    actions = run(b["observation"], dims, jax.random.key(0))
    assert actions.shape == (2, 2, 3)
    assert actions.dtype == jnp.float32
    assert np.isfinite(actions).all()
    np.testing.assert_array_equal(actions, run(b["observation"], dims, jax.random.key(0)))
    assert np.abs(actions - run(b["observation"], dims, jax.random.key(1))).max() > 0
    with pytest.raises(ValueError, match="unknown head: 'actoin'; did you mean 'action'"):
        model.apply(variables, b["observation"], b["task"], head="actoin", method="sample_actions")


def test_a_shorter_window_is_valid_and_a_longer_one_is_an_error(model, variables):
    def run(window):
        b = fakes.batch(fakes.spec(window=window), 1)
        shapes = jax.eval_shape(
            lambda: model.apply(
                variables, b["observation"], b["task"], train=False, method="encode"
            )
        )
        return shapes["readout_action"].tokens.shape

    assert run(1) == (1, 1, 1, 16)
    with pytest.raises(ValueError, match="3 frames; the model's window is 2"):
        run(3)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    model = build_network(fakes.model(dtype="bfloat16"), SPEC, fakes.NAMES)
    b = fakes.batch(SPEC, 2)
    rngs = {k: jax.random.key(0) for k in ("params", "noise", "dropout")}
    shapes = jax.eval_shape(lambda: model.init(rngs, b, train=False))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    groups = jax.eval_shape(
        lambda: model.apply(zero, b["observation"], b["task"], train=False, method="encode")
    )
    assert {g.tokens.dtype for g in groups.values()} == {jnp.dtype("bfloat16")}
    total, _ = jax.eval_shape(lambda: model.apply(zero, b, train=True, rngs=rngs))
    assert total.dtype == jnp.float32


def tree(model, spec) -> dict[str, tuple[int, ...]]:
    rngs = {"params": jax.random.key(0), "noise": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: model.init(rngs, zeros(spec, 1), train=False))
    assert set(shapes) == {"params"}
    return {path.replace(".", "/"): x.shape for path, x in flatten(shapes["params"])}


def test_parameter_tree_is_the_golden_one(model):
    listing = "".join(f"{path} {shape}\n" for path, shape in tree(model, SPEC).items())
    assert listing == GOLDEN_TREE.read_text(encoding="utf-8"), (
        "parameter paths or shapes changed: checkpoints written before no longer load. If that is "
        f"meant, write this to {GOLDEN_TREE}:\n{listing}"
    )


@pytest.mark.parametrize(
    ("sizes", "published"),
    [((384, 12, 6, 1536), 27_042_060), ((768, 12, 12, 3072), 92_830_092)],
    ids=["octo-small", "octo-base"],
)
def test_parameter_counts_equal_those_of_octo(sizes, published):
    spec = fakes.spec(window=10, horizon=4, action_dim=7, cameras={"primary": 256, "wrist": 128})
    for key in ("ids", "mask"):
        spec[f"task.language.{key}"] = ((16,), spec[f"task.language.{key}"][1])
    stem = {"kind": "small_stem"}
    cameras = {
        camera: {"kind": "image", "cameras": (camera,), "goal": True, "encoder": stem}
        for camera in ("primary", "wrist")
    }
    words = {"kind": "language", "vocabulary": 1, "width": 768}
    config = fakes.model(
        tokenizers={"language": words, **cameras},
        readouts={"action": 1},
        heads={"action": {"kind": "diffusion"}},
    )
    config |= dict(zip(("width", "layers", "attention_heads", "mlp_width"), sizes, strict=True))
    count = sum(
        int(np.prod(shape))
        for shape in tree(build_network(config, spec, fakes.NAMES), spec).values()
    )
    assert (
        count - 768 == published
    )  # Octo's count without its language encoder, which is one word here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizers": {"x": {"kind": "imgae"}}},
            "unknown kind at model.tokenizers.x: 'imgae'; did you mean 'image'",
        ),
        (
            {"tokenizers": {"x": {"kind": "image", "encoder": {"kind": "mlp"}}}},
            "unknown kind at model.tokenizers.x.encoder: 'mlp'.*keypoints, patch, .*small_stem",
        ),
        (
            {"tokenizers": {"x": {"kind": "image", "encoder": {"kind": "patch", "size": 3}}}},
            "unknown field of model.tokenizers.x.encoder .*'size'.*patch, width",
        ),
        (
            {"tokenizers": {"x": {"kind": "image"}}},
            "model.tokenizers.x .'image'. lacks 'encoder'",
        ),
        (
            {
                "tokenizers": {
                    "x": {"kind": "image", "cameras": ("left",), "encoder": {"kind": "patch"}}
                }
            },
            "reads 'observation.image_left', which the data do not have .*observation.image_wrist",
        ),
        (
            {
                "tokenizers": {
                    "x": {"kind": "image", "cameras": "wrist", "encoder": {"kind": "patch"}}
                }
            },
            "model.tokenizers.x.cameras is 'wrist'; expected a tuple",
        ),
        (
            {"tokenizers": {"x": {"kind": "image", "film": True, "encoder": {"kind": "patch"}}}},
            "model.tokenizers.x.film needs a tokenizer of the task",
        ),
        (
            {"tokenizers": {"x": {"kind": "language", "vocabulary": 8}}},
            "none reads the observation",
        ),
        ({"tokenizers": {"x": {"kind": "language"}}}, "lacks 'vocabulary'"),
        ({"heads": {}}, "model.heads is empty"),
        (
            {"heads": {"action": {"kind": "l1", "readout": "action"}}},
            "unknown readout of model.heads.action: 'action'; did you mean 'readout_action'",
        ),
        (
            {"heads": {"action": {"kind": "l1", "horizon": 8}}},
            "model.heads.action.horizon follows from the rest of the config",
        ),
        (
            {"heads": {"action": {"kind": "diffusion", "inference_steps": 5}}},
            "choose 'ddim' for fewer",
        ),
        (
            {"heads": {"action": {"kind": "diffusion", "prediction": "nois"}}},
            "unknown value of .*prediction: 'nois'; did you mean 'noise'",
        ),
    ],
)
def test_invalid_configs_are_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        build_network(fakes.model(**change), SPEC, fakes.NAMES)


def test_a_network_without_readouts_reads_its_observations():
    head = {"kind": "mse", "readout": "obs", "pooling": "attention", "pooling_heads": 2}
    spec = fakes.spec(window=1)
    settings = fakes.model(readouts={}, heads={"action": head})
    model = build_network(settings, spec, fakes.NAMES)
    batch = fakes.batch(spec, 2)
    variables = fakes.parameters(model.init, batch, train=False)
    loss = lambda v: model.apply(v, batch, train=False, rngs={"noise": jax.random.key(0)})[0]
    grads = jax.grad(loss)(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["params"]["tokenizers_wrist"]["encoder"]["out"]["kernel"]).max() > 0
    actions = model.apply(
        variables,
        batch["observation"],
        batch["task"],
        method="sample_actions",
        rngs={"noise": jax.random.key(0)},
    )
    assert actions.shape == (2, *spec["action"][0][1:])
