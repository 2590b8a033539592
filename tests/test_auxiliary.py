"""The next closing of the gripper: labels in batches, the auxiliary head that predicts them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import model_fakes as fakes
import numpy as np
import optax
import pytest
from data_fakes import config, numbered, opened, write

from octolike.config import Component, ConfigError
from octolike.data import open_data
from octolike.data.pipeline.closings import unlabelled_reason
from octolike.data.specs.catalog import find_spec
from octolike.data.specs.planned import plan_data
from octolike.model.network import SHARED_LOSSES, build_network
from octolike.policy import Policy
from octolike.train import checkpoint, loop, metrics

CAMERAS = ("image_primary", "image_wrist")


def demonstration(number, gripper):
    """Return a numbered episode with a random path and the given gripper targets, 1 = open."""
    episode = numbered(number, len(gripper), CAMERAS, "do it")
    episode["steps"]["action"][:, 6] = gripper
    path = np.random.default_rng(number).normal(size=(len(gripper), 7)).astype(np.float32)
    episode["steps"]["observation"]["state"] = path
    return episode


def demonstrations():
    """Return episodes with every way of a gripper: never closed, always, again and again."""
    rng = np.random.default_rng(0)
    grippers = [np.ones(5), np.zeros(5), np.array([1, 0, 1, 0, 0, 1, 1, 0.2, 0.7])]
    grippers += [rng.integers(0, 2, n) for n in (1, 4, 7, 9)]
    return [demonstration(i, g) for i, g in enumerate(grippers)]


def expected(episode, step, end):
    """Return the label of a step by its definition, None for none; end: the first step after it."""
    steps = episode["steps"]
    path, gripper = steps["observation"]["state"][:, :3], steps["action"][:, 6]
    for t in range(step, end):
        if t > 0 and gripper[t - 1] >= 0.5 > gripper[t]:
            return path[t] - path[step]
    return None


@pytest.mark.parametrize("goal", ["none", "uniform"])
def test_labels_equal_their_definition(tmp_path, goal):
    episodes = demonstrations()
    write(tmp_path, "tabletop", {"train": episodes})
    options = {"window": 3, "closings": True, "validation_split": "", "goal": goal}
    options |= {"keep_goal": 0.7, "batch_size": 16}
    data = opened(tmp_path, "tabletop", **options)
    stream, seen = data.train(), set()
    for _ in range(12):
        batch = next(stream)
        frames, exists = (
            batch["observation"]["image_primary"],
            batch["observation"]["timestep_mask"],
        )
        label = batch["closing"]
        for b, w in np.ndindex(exists.shape):
            number, step = frames[b, w, 0, 0, :2].tolist()
            end = len(episodes[number]["steps"]["action"])
            if goal != "none" and batch["task"]["present"]["image_primary"][b]:
                end = batch["task"]["image_primary"][b, 0, 0, 1]
            position = expected(episodes[number], step, end) if exists[b, w] else None
            assert label["mask"][b, w] == (position is not None)
            position = np.zeros(3) if position is None else position
            np.testing.assert_allclose(label["position"][b, w], position, atol=1e-6)
            seen.add((number, step, bool(label["mask"][b, w])))
    assert len({x for x in seen if x[2]}) > 8 < len({x for x in seen if not x[2]})
    planned = plan_data(config(tmp_path, "tabletop", **options)).spec
    for spec in planned, data.spec:
        assert {k: v for k, v in spec.items() if k.startswith("closing")} == {
            "closing.position": ((3, 3), "float32"),
            "closing.mask": ((3,), "bool"),
        }
    plain = plan_data(config(tmp_path, "tabletop", **options | {"closings": False})).spec
    assert not [path for path in plain if path.startswith("closing")]


def test_steps_without_a_label_are_counted_at_the_start(tmp_path):
    episodes = demonstrations()
    write(tmp_path, "tabletop", {"train": episodes})
    lengths = [len(e["steps"]["action"]) for e in episodes]
    labels = [expected(e, t, n) for e, n in zip(episodes, lengths, strict=True) for t in range(n)]
    count = sum(x is not None for x in labels)
    description = opened(tmp_path, "tabletop", closings=True, validation_split="").describe()
    assert f"tabletop: {count} of {len(labels)} steps in 7 episodes have a label" in description


def test_a_dataset_that_cannot_have_labels_is_named_with_the_reason(tmp_path):
    for name in ("tabletop", "blind"):
        write(tmp_path, name, {"train": demonstrations()})
    specs = tmp_path / "specs.py"
    specs.write_text(
        "from dataclasses import replace\n"
        "from octolike.data.specs.catalog import find_spec\n"
        "DATASETS = [replace(find_spec('tabletop'), name='blind', gripper='absolute, 1 = closed')]"
    )
    options = {"specs": (str(specs),), "closings": True, "validation_split": "", "batch_size": 16}
    data = opened(tmp_path, "tabletop=1,blind=1", **options)
    steps = sum(len(e["steps"]["action"]) for e in demonstrations())
    reason = "no next closing in blind: the spec's gripper is 'absolute, 1 = closed'"
    lines = [line for line in data.describe().splitlines() if "next closing" in line]
    assert len(lines) == 2
    assert lines[1].startswith(reason)
    assert lines[1].endswith(f"its {steps} steps have no label")
    batch = next(data.train())
    is_blind = batch["dataset"] == data.datasets.index("blind")
    assert batch["closing"]["mask"][~is_blind].any()
    assert not batch["closing"]["mask"][is_blind].any()
    with pytest.raises(ConfigError, match=r"no dataset of the mix .*blind: the spec's"):
        opened(tmp_path, "blind", **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bridge_dataset", ""),
        ("fractal20220817_data", ""),
        ("libero_object_no_noops", ""),
        ("metaworld", "'effort, -1 opens"),
        ("aloha", "no action is named 'gripper'"),
        ("austin_buds_dataset_converted_externally_to_rlds", "no position x, y, z in metres"),
        ("roboturk", "it has no proprio"),
        ("language_table", "no action is named 'gripper'"),
        ("cmu_playing_with_food", "unverified"),
    ],
)
def test_positions_and_grippers_of_known_datasets(name, reason):
    found = unlabelled_reason(find_spec(name))
    assert found == reason if not reason else reason in found


@pytest.mark.parametrize(
    ("gripper", "is_labelled"),
    [
        ("1 = open; stored: 0 = open", True),
        ("-1 = open, 1 = closed", False),
        ("1 = closed; stored: 1 = open", False),
        ("0 = open", False),
    ],
)
def test_the_spec_states_which_value_is_open(gripper, is_labelled):
    spec = dataclasses.replace(find_spec("tabletop"), gripper=gripper)
    assert (unlabelled_reason(spec) == "") == is_labelled


def test_positions_in_centimetres_have_no_label():
    spec = find_spec("tabletop")
    layout = dataclasses.replace(spec.proprio, units=("cm", *spec.proprio.units[1:]))
    reason = unlabelled_reason(dataclasses.replace(spec, proprio=layout))
    assert reason == "its proprio has no position x in metres"


LABELS = {"closing.position": ((2, 3), "float32"), "closing.mask": ((2,), "bool")}
SPEC = fakes.spec() | LABELS
TARGET = {"kind": "closing_position", "weight": 0.5, "hidden": 8}


PLAIN = fakes.model(
    layers=1, tokenizers={"proprio": {"kind": "proprio"}}, heads={"action": {"kind": "l1"}}
)


def network(**target):
    """Return a small network with an auxiliary head, random parameters for it, and a batch."""
    settings = PLAIN | {"auxiliary": {"target": TARGET | target}}
    model = build_network(settings, SPEC, fakes.NAMES)
    batch = fakes.batch(SPEC, 6)
    batch["closing"]["mask"][1] = False
    batch["action_mask"][2] = False
    batch["observation"]["timestep_mask"][3, 0] = False
    return model, fakes.parameters(model.init, batch, train=True), batch


@pytest.mark.parametrize(
    ("readout", "pooling"), [("readout_action", "mean"), ("readout_other", "attention")]
)
def test_the_loss_is_a_mean_over_labelled_steps_with_a_valid_action(readout, pooling):
    model, variables, batch = network(readout=readout, pooling=pooling, pooling_heads=2, scale=0.2)
    rngs = {"noise": jax.random.key(0)}

    def predict(net):
        group = net.encode(batch["observation"], batch["task"], train=False)[readout]
        return net.auxiliary["target"].predict(group)

    @jax.jit
    def measure(batch):
        result = model.apply(variables, batch, train=True, rngs=rngs)
        return *result, model.apply(variables, method=predict)

    loss, out, positions = jax.device_get(measure(batch))
    errors, distances = [], []
    for b, w in np.ndindex(6, 2):
        if b in (1, 2) or (b, w) == (3, 0):
            continue
        difference = positions[b, w] - batch["closing"]["position"][b, w]
        errors.append(np.abs(difference).sum() / 0.2)
        distances.append(np.sqrt((difference**2).sum()))
    assert len(errors) == 7
    np.testing.assert_allclose(out["target/loss"], np.mean(errors), rtol=1e-5)
    np.testing.assert_allclose(out["target/metres"], np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(out["target/labelled"], 7 / 9, rtol=1e-6)
    np.testing.assert_allclose(out["auxiliary_loss"], 0.5 * np.mean(errors), rtol=1e-5)
    total = out["action_loss"] + sum(out.get(name, 0) for name in SHARED_LOSSES)
    np.testing.assert_allclose(loss, total, rtol=1e-6)


def test_labels_teach_the_network_and_unlabelled_steps_do_not():
    model, variables, batch = network()
    rngs = {"noise": jax.random.key(0)}

    @jax.jit
    def gradient(position, mask):
        labelled = {**batch, "closing": {"position": position, "mask": mask}}

        def loss(params):
            return model.apply({"params": params}, labelled, train=True, rngs=rngs)[1][
                "auxiliary_loss"
            ]

        return jax.grad(loss)(variables["params"])

    position, mask = batch["closing"]["position"], batch["closing"]["mask"]
    grads = gradient(position, mask)
    assert any(x.any() for x in jax.tree.leaves(grads["transformer"])), "reaches the shared part"
    assert not any(x.any() for x in jax.tree.leaves(grads["heads_action"]))
    hidden = position.copy()
    hidden[1], hidden[2], hidden[3, 0] = 9, 7, -9
    assert_equal(gradient(hidden, mask), grads)
    none = gradient(position, np.zeros_like(mask))
    assert not any(x.any() for x in jax.tree.leaves(none))
    visible = position.copy()
    visible[0] += 1
    assert any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (gradient(visible, mask), grads)), strict=True)
    )


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_acting_needs_no_label_and_does_not_change():
    """With an auxiliary head on the readout of the action head, and without it."""
    model, variables, batch = network()
    plain = build_network(PLAIN, fakes.spec(), fakes.NAMES)
    own = {k: v for k, v in variables["params"].items() if not k.startswith("auxiliary_")}
    assert own.keys() == fakes.parameters(plain.init, batch, train=True)["params"].keys()

    def act(net, params):
        inputs = batch["observation"], batch["task"]
        actions = net.apply({"params": params}, *inputs, method="sample_actions")
        return actions, net.apply({"params": params}, batch, train=True)[1]

    without, out = jax.jit(functools.partial(act, plain))(own)
    actions, other = jax.jit(functools.partial(act, model))(variables["params"])
    np.testing.assert_array_equal(actions, without)
    assert out["action_loss"] == other["action_loss"]
    assert set(other) - set(out) == {
        *("target/loss", "target/metres", "target/labelled", "auxiliary_loss")
    }


@pytest.mark.parametrize(
    ("component", "spec", "message"),
    [
        (
            TARGET,
            fakes.spec(),
            "auxiliary.target reads the label 'closing.position'.*data.closings",
        ),
        (TARGET | {"readout": "action"}, SPEC, "readout of model.auxiliary.target: 'action'"),
        (TARGET | {"kind": "closing"}, SPEC, "kind at model.auxiliary.target: 'closing'; did you"),
        (TARGET | {"scale": 0.0}, SPEC, "model.auxiliary.target.scale is 0"),
    ],
)
def test_a_wrong_auxiliary_head_is_refused(component, spec, message):
    with pytest.raises(ConfigError, match=message):
        build_network(fakes.model(auxiliary={"target": component}), spec, fakes.NAMES)


def test_the_head_learns_where_the_gripper_will_close():
    """The place depends on the state; random labels of other steps must not disturb."""
    model, variables, _ = network(readout="readout_other", weight=1.0, hidden=32)
    tx, place = optax.adam(1e-2), np.random.default_rng(5).normal(size=(4, 3)) * 0.1

    def examples(seed):
        batch = fakes.batch(SPEC, 32, seed)
        batch["closing"]["mask"] = np.random.default_rng(seed).random((32, 2)) < 0.5
        position = np.sin(batch["observation"]["proprio"]) @ place
        noise = np.random.default_rng(seed).normal(size=position.shape)
        label = np.where(batch["closing"]["mask"][..., None], position, noise)
        batch["closing"]["position"] = label.astype(np.float32)
        return batch

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            return model.apply({"params": params}, batch, train=True)

        grads, out = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, out["target/metres"]

    params = variables["params"]
    state, metres = tx.init(params), []
    for i in range(300):
        params, state, error = step(params, state, examples(i))
        metres.append(error)
    spread = np.linalg.norm(np.sin(np.random.default_rng(1).normal(size=(999, 4))) @ place, axis=-1)
    assert np.mean(metres[-10:]) < 0.25 * spread.mean()
    assert jnp.isfinite(jnp.stack(metres)).all()


def run_config(tmp_path, name, **train):
    result = config(
        tmp_path, "tabletop", cameras={}, closings=True, validation_split="val", batch_size=8
    )
    result.workdir = str(tmp_path / name)
    model = result.model
    model.width, model.layers, model.attention_heads, model.mlp_width = 16, 1, 2, 16
    model.tokenizers = {"proprio": Component(kind="proprio")}
    model.readouts["target"] = 1
    model.heads["action"] = Component(kind="l1")
    model.auxiliary["target"] = Component(**TARGET | {"readout": "readout_target"})
    result.optim.warmup, result.train.steps, result.train.log_every = 1, 3, 1
    for option, value in train.items():
        setattr(result.train, option, value)
    return result


def test_a_run_logs_it_saves_it_acts_without_it_and_is_finetuned(tmp_path):
    held_out = [
        demonstration(20, np.array([1, 1, 0, 0, 1, 1, 1, 0])),
        demonstration(21, np.ones(4)),
    ]
    write(tmp_path, "tabletop", {"train": demonstrations(), "val": held_out})
    options = run_config(tmp_path, "run")
    loop.train(options, open_data(options))
    rows = metrics.read(tmp_path / "run" / metrics.FILE)
    names = {"target/loss", "target/metres", "target/labelled", "auxiliary_loss"}
    assert names <= rows[0].keys()
    last = rows[-1]
    measures = ("loss", "metres", "labelled")
    validation = {m: last[f"validation/tabletop/target/{m}"] for m in measures}
    assert validation["metres"] > 0
    assert 0 < validation["labelled"] < 1  # one of the two episodes never closes
    run = checkpoint.load_run(str(tmp_path / "run"))
    assert "auxiliary_target" in run.params
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["auxiliary"]["target"]["scale"] == 0.1
    policy = Policy.load(str(tmp_path / "run"))
    assert not [key for key in policy.reads if "closing" in key]
    observation = {"proprio": np.zeros(7, np.float32)}
    assert policy.sample_actions(observation, policy.create_task()).shape[-1] == 7
    tuned = run_config(tmp_path, "tuned", init_from=str(tmp_path / "run"), steps=1)
    tuned.optim.learning_rate = 0.0
    loop.train(tuned, open_data(tuned))
    kept = checkpoint.load_run(str(tmp_path / "tuned")).params["auxiliary_target"]
    assert_equal(kept, run.params["auxiliary_target"])
    dropped = run_config(tmp_path, "dropped", init_from=str(tmp_path / "run"), steps=1)
    dropped.model.auxiliary, dropped.data.closings = {}, False
    with pytest.raises(ConfigError, match="auxiliary_target"):
        loop.train(dropped, open_data(dropped))
    dropped.train.reinit = ("auxiliary_target*",)
    loop.train(dropped, open_data(dropped))
