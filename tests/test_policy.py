"""Policy: raw observations to robot actions, its errors, and acting without tensorflow."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from policy_fakes import SIDE, A, H, P, W, robot, run_of, save_run, spec

from octolike import types
from octolike.config import Component
from octolike.images import KERNELS, resize
from octolike.policy import Policy
from octolike.policy.observations import ObservationEncoder
from octolike.text import HashTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def policy():
    return Policy(run_of(), batch_size=4)


@pytest.fixture(scope="module")
def goal_policy():
    return Policy(run_of(language=True, goal=True))


def observation(seed=0, frames=None, side=SIDE):
    rng = np.random.default_rng(seed)
    lead = () if frames is None else (frames,)
    return {
        "image_primary": rng.integers(0, 256, (*lead, side, side, 3), dtype=np.uint8),
        "proprio": rng.normal(size=(*lead, P)).astype(np.float32),
    }


def encode(policy, raw):
    """Return the network's input for one observation, without the batch axis."""
    return policy._parts.observations.encode(raw)


# Acting


def test_a_chunk_is_in_the_robots_units(policy):
    task = policy.create_task(instruction="lift the cube")
    actions = policy.sample_actions(observation(), task, seed=3)
    assert actions.shape == (H, A)
    assert actions.dtype == np.float32
    inputs = jax.tree.map(lambda x: x[None], (encode(policy, observation()), task.inputs))
    normalized = policy.sample_normalized(*inputs, [3])[0]
    values = np.linspace(1, 2, A)  # mean and std of `statistics`; the gripper is left as it is
    scale, shift = np.where(np.arange(A) < 6, values, 1), np.where(np.arange(A) < 6, values, 0)
    np.testing.assert_allclose(actions, normalized * scale + shift, rtol=1e-5)


def test_the_network_input_equals_the_batch_contract(policy):
    """A single frame is repeated in front and masked there; proprio is normalised."""
    inputs, raw = encode(policy, observation()), observation()
    shapes = {k[12:]: v for k, v in spec().items() if k.startswith("observation.")}
    assert {k: (x.shape, x.dtype.name) for k, x in types.flatten(inputs)} == shapes
    assert inputs["timestep_mask"].tolist() == [False, True]
    assert inputs["present"]["image_primary"].all()
    for t in range(W):
        np.testing.assert_array_equal(inputs["image_primary"][t], raw["image_primary"])
        np.testing.assert_allclose(
            inputs["proprio"][t], robot().normalize_proprio(raw["proprio"][None])[0]
        )


def test_a_short_history_is_padded_in_front():
    """Two of three frames: a window of two would not show on which side the frame is repeated."""
    batch = {k: ((3, *shape[1:]), dtype) for k, (shape, dtype) in spec().items() if shape}
    raw = observation(frames=2)
    inputs = ObservationEncoder(batch, robot(), "area").encode(raw)
    assert inputs["timestep_mask"].tolist() == [False, True, True]
    np.testing.assert_array_equal(inputs["image_primary"], raw["image_primary"][[0, 0, 1]])
    expected = robot().normalize_proprio(raw["proprio"])[[0, 0, 1]]
    np.testing.assert_allclose(inputs["proprio"], expected)


def test_a_full_history_keeps_its_frames_and_its_mask(policy):
    raw = observation(frames=W) | {"timestep_mask": np.array([True, True])}
    inputs = encode(policy, raw)
    np.testing.assert_array_equal(inputs["image_primary"], raw["image_primary"])
    assert inputs["timestep_mask"].tolist() == [True, True]
    masked = encode(policy, raw | {"timestep_mask": np.array([False, True])})
    assert masked["timestep_mask"].tolist() == [False, True]


def test_masked_history_does_not_matter(policy):
    task = policy.create_task(instruction="lift the cube")
    expected = policy.sample_actions(observation(), task)
    padded = {k: np.stack([np.zeros_like(v), v]) for k, v in observation().items()}
    padded["timestep_mask"] = np.array([False, True])
    np.testing.assert_allclose(policy.sample_actions(padded, task), expected, atol=1e-5)


def test_the_noise_depends_on_the_seed_and_not_on_the_batch(policy):
    """Example i of a batch equals the same example alone, so rollouts do not depend on batching."""
    words = ["lift the cube", "push the ball to the left", "touch the bowl"]
    tasks = [policy.create_task(instruction=w) for w in words]
    observations = [observation(i) for i in range(3)]
    together = policy.sample_batch(observations, tasks, [5, 6, 7])
    for i in range(3):
        alone = policy.sample_actions(observations[i], tasks[i], seed=5 + i)
        np.testing.assert_allclose(together[i], alone, atol=1e-5)
    again = policy.sample_batch(observations, tasks, [5, 6, 7])
    np.testing.assert_array_equal(together, again)
    assert (
        np.abs(policy.sample_actions(observations[0], tasks[0], seed=9) - together[0]).max() > 1e-3
    )
    # A batch longer than the compiled one is split.
    many = policy.sample_batch([observations[0]] * 6, [tasks[0]] * 6, [5] * 6)
    np.testing.assert_allclose(many, np.repeat(together[:1], 6, axis=0), atol=1e-5)
    assert policy._parts.sampler.compilations == 1


def test_instruction_and_observation_matter(policy):
    a, b = (policy.create_task(instruction=w) for w in ("lift the cube", "touch the bowl"))
    base = policy.sample_actions(observation(), a)
    assert np.abs(policy.sample_actions(observation(), b) - base).max() > 1e-5
    assert np.abs(policy.sample_actions(observation(1), a) - base).max() > 1e-5


def test_an_untrained_policy_shares_the_compiled_function(policy):
    fresh = policy.untrained(seed=1)
    task = policy.create_task(instruction="lift the cube")
    a, b = (p.sample_actions(observation(), task) for p in (policy, fresh))
    assert np.abs(a - b).max() > 1e-3
    assert fresh.step == 0
    assert policy.step == 7
    assert policy._parts.sampler.compilations == 1


def test_a_narrower_robot_gets_its_own_dimensions():
    policy = Policy(run_of([robot("arm"), robot("slim", width=4)]), embodiment="slim")
    actions = policy.sample_actions(observation(), policy.create_task(instruction="go"))
    assert actions.shape == (H, 4)


def test_goal_images_and_instructions(goal_policy):
    goal = np.full((40, 30, 3), 200, np.uint8)
    tasks = {
        "both": goal_policy.create_task("lift the cube", {"primary": goal}),
        "language": goal_policy.create_task("lift the cube"),
        "goal": goal_policy.create_task(goal_images={"primary": goal}),
    }
    present = {k: t.inputs["present"] for k, t in tasks.items()}
    assert present["both"] == {"language": True, "image_primary": True, "task_id": False}
    assert present["language"] == {"language": True, "image_primary": False, "task_id": False}
    assert present["goal"] == {"language": False, "image_primary": True, "task_id": False}
    assert tasks["goal"].inputs["image_primary"].shape == (SIDE, SIDE, 3)
    chunks = [goal_policy.sample_actions(observation(), t) for t in tasks.values()]
    assert np.abs(chunks[0] - chunks[1]).max() > 1e-5
    assert np.abs(chunks[1] - chunks[2]).max() > 1e-5


def test_goal_and_instruction_together_are_a_warning_if_training_showed_one_of_them():
    run, goal = run_of(language=True, goal=True), {"primary": np.zeros((SIDE, SIDE, 3), np.uint8)}
    Policy(run).create_task("lift the cube", goal)  # no warning, else an error
    run.config.data.exclusive = True
    policy = Policy(run)
    policy.create_task("lift the cube")
    policy.create_task(goal_images=goal)
    with pytest.warns(UserWarning, match=r"never on both \(data\.exclusive\)") as record:
        task, _ = [policy.create_task("lift the cube", goal) for _ in range(2)]
    assert len(record) == 1
    assert record[0].filename == __file__
    assert task.inputs["present"]["language"]
    assert task.inputs["present"]["image_primary"]


def test_a_sensor_that_the_robot_lacks_is_marked_absent(policy):
    inputs = encode(policy, observation() | {"proprio": None})
    assert not inputs["present"]["proprio"].any()
    assert not inputs["proprio"].any()


# Refusals


def without(key):
    return {k: v for k, v in observation().items() if k != key}


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (without("image_primary"), "lacks image_primary: this policy was trained with"),
        (without("proprio"), "lacks proprio"),
        (observation() | {"image_wrist": 0}, "unknown key of the observation: 'image_wrist'"),
        (
            observation() | {"image_primary": np.zeros((SIDE, SIDE, 3), np.float32)},
            r"is float32 \[16, 16, 3\]; expected uint8 .* give the raw camera image",
        ),
        (
            observation() | {"image_primary": np.zeros((SIDE, SIDE), np.uint8)},
            r"is uint8 \[16, 16\]; expected uint8 \[h, w, 3\]",
        ),
        (
            observation() | {"image_primary": np.zeros((SIDE, SIDE, 4), np.uint8)},
            r"is uint8 \[16, 16, 4\]",
        ),
        (observation() | {"proprio": np.zeros(5)}, r"float64 \[5\]; expected float32 \[7\]"),
        (observation() | {"proprio": np.zeros(P, int)}, r"is int64 \[7\]; expected float32"),
        (observation() | {"proprio": np.full(P, np.nan)}, "not finite"),
        (observation(frames=3), "has 3 frames; this policy was trained on windows of 2"),
        (observation(frames=0) | {"proprio": None}, r"is uint8 \[0, 16, 16, 3\]"),
        (observation(frames=2) | {"proprio": np.zeros(P)}, "histories differ in length"),
        (observation() | {"timestep_mask": np.ones(1)}, r"float64 \[1\]; expected bool"),
        (observation() | {"timestep_mask": np.array([False])}, "hides the newest frame"),
        ({"image_primary": None, "proprio": None}, "every sensor of the observation is None"),
        ([1, 2], "is a list; expected a dict"),
    ],
)
def test_bad_observations_are_refused(policy, bad, match):
    with pytest.raises(ValueError, match=match):
        policy.sample_actions(bad, policy.create_task(instruction="go"))


def test_bad_tasks_are_refused(policy, goal_policy):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    cases = [
        (policy, {}, r"lacks an instruction: this policy needs create_task\(instruction=…\)"),
        (policy, {"instruction": " "}, "the instruction is ' '"),
        (policy, {"instruction": 3}, "the instruction is 3"),
        (policy, {"goal_images": {"primary": image}}, "trained without goals"),
        (goal_policy, {}, r"instruction=… or goal_images"),
        (goal_policy, {"goal_images": {"primry": image}}, "'primry'; did you mean 'primary'"),
        (goal_policy, {"goal_images": {"primary": image / 255}}, "is float64"),
    ]
    for chosen, arguments, match in cases:
        with pytest.raises(ValueError, match=match):
            chosen.create_task(**arguments)
    blind = Policy(run_of(language=False, goal=True))
    with pytest.raises(ValueError, match="trained without language"):
        blind.create_task(instruction="go")
    with pytest.raises(ValueError, match="lacks a goal image"):
        blind.create_task()


def test_a_policy_accepts_the_conditionings_that_its_network_was_trained_on():
    """Conditionings of the data that the network does not read, or always dropped, do not count."""
    run = run_of(language=True, goal=True)
    names = run.names._replace(tasks=("lift", "push"))
    tokenizers = dict(run.config.model.tokenizers)
    tokenizers["primary"] = tokenizers["primary"] | {"goal": False}
    del tokenizers["language"]
    run = dataclasses.replace(run, names=names)
    run.config.model.tokenizers = tokenizers
    unconditioned = Policy(run)
    assert unconditioned.goal_shapes == {}
    assert not any(unconditioned.create_task().inputs["present"].values())
    with pytest.raises(ValueError, match="without language; it takes no task at all"):
        unconditioned.create_task(instruction="go")
    with pytest.raises(ValueError, match="without goals; it takes no task at all"):
        unconditioned.create_task(goal_images={"primary": observation()["image_primary"]})
    with pytest.raises(ValueError, match=r"'lift' was given, but .* without task ids"):
        unconditioned.create_task(task_id="lift")
    run.config.model.tokenizers = tokenizers | {"task": Component(kind="task_id")}
    numbered = Policy(run)
    inputs = numbered.create_task(task_id="push").inputs
    assert (inputs["task_id"], inputs["present"]["task_id"]) == (1, True)
    with pytest.raises(ValueError, match="unknown task id: 'pusj'; did you mean 'push'"):
        numbered.create_task(task_id="pusj")
    with pytest.raises(ValueError, match=r"lacks a task id: .* create_task\(task_id=…\)"):
        numbered.create_task()
    run.config.data.keep_task_id = 0.0
    with pytest.raises(ValueError, match="trained without task ids"):
        Policy(run).create_task(task_id="push")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_per_task_is_chosen_by_the_task_id(wrapped):
    """data.keep_task_id only hides the id from tokenizers: the head still needs it."""
    run = run_of()
    run = dataclasses.replace(run, names=run.names._replace(tasks=("lift", "push")))
    head = {"kind": "per_group", "by": "task", "head": {"kind": "l1"}}
    outer = Component(kind="hypernet", target="adapter", head=head)
    run.config.model.heads = {"action": outer if wrapped else Component(**head)}
    run.config.data.keep_task_id = 0.0
    policy = Policy(run)
    assert policy.create_task("lift it", task_id="push").inputs["task_id"] == 1
    with pytest.raises(ValueError, match=r"lacks a task id, by which .* one of lift, push"):
        policy.create_task("lift it")


def test_missing_and_ambiguous_records_are_refused():
    with pytest.raises(ValueError, match="holds no embodiment record"):
        Policy(run_of([]))
    run = run_of([robot("arm"), robot("leg")])
    with pytest.raises(ValueError, match=r"name one of them: embodiment=arm \| leg"):
        Policy(run)
    with pytest.raises(ValueError, match="unknown embodiment: 'amr'; did you mean 'arm'"):
        Policy(run, embodiment="amr")
    assert Policy(run, embodiment="leg").embodiment.name == "leg"


def test_batches_of_different_lengths_are_refused(policy):
    task = policy.create_task(instruction="go")
    with pytest.raises(ValueError, match="2 observations, 1 tasks and 2 seeds"):
        policy.sample_batch([observation()] * 2, [task], [0, 1])
    with pytest.raises(ValueError, match="no observations"):
        policy.sample_batch([], [], [])


def test_actions_that_are_not_finite_are_refused():
    run = run_of()
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), run.params)
    policy = Policy(dataclasses.replace(run, params=broken))
    with pytest.raises(FloatingPointError, match=r"not finite, for examples \[0\]"):
        policy.sample_actions(observation(), policy.create_task(instruction="go"))


# Images


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_size_is_resized_as_in_the_run(kernel):
    run = run_of(goal=True)
    run.config.data.resize = kernel
    policy = Policy(run)
    big = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    expected = resize(big, SIDE, SIDE, kernel)
    inputs = encode(policy, observation() | {"image_primary": big})
    np.testing.assert_array_equal(inputs["image_primary"][-1], expected)
    task = policy.create_task(instruction="go", goal_images={"primary": big})
    np.testing.assert_array_equal(task.inputs["image_primary"], expected)
    assert policy.sample_actions(observation() | {"image_primary": big}, task).shape == (H, A)


# From disk, without tensorflow

ACT = """
import sys

for name in ("tensorflow", "tensorflow_datasets", "rlds"):
    sys.modules[name] = None  # importing it raises ImportError
import json, numpy as np
from octolike.policy import Policy
from octolike.text import HashTokenizer
policy = Policy.load(sys.argv[1])
rng = np.random.default_rng(0)
observation = {"image_primary": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),
               "proprio": rng.normal(size=7).astype(np.float32)}
task = policy.create_task(instruction="lift the cube")
print(json.dumps([policy.step, policy.sample_actions(observation, task, seed=3).tolist()]))
"""


def test_a_policy_loads_and_acts_if_tensorflow_cannot_be_imported(policy, tmp_path):
    run = save_run(tmp_path, run_of())
    done = subprocess.run(
        [sys.executable, "-c", ACT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    step, actions = json.loads(done.stdout.splitlines()[-1])
    assert step == run.step
    expected = policy.sample_actions(
        observation(), policy.create_task(instruction="lift the cube"), seed=3
    )
    np.testing.assert_allclose(actions, expected, atol=1e-4)


def with_ranges(run, low, high):
    """Return the run with proprio recorded from low to high, and mean and deviation of 1."""
    (arm,) = run.embodiments
    s = dataclasses.replace(
        arm.proprio_statistics, min=np.full(P, low, np.float32), max=np.full(P, high, np.float32)
    )
    return dataclasses.replace(run, embodiments=[dataclasses.replace(arm, proprio_statistics=s)])


def test_proprio_in_other_units_than_the_record_is_a_warning_once_per_dimension():
    policy = Policy(with_ranges(run_of(), -1, 1))
    task = policy.create_task(instruction="go")
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    proprio = np.zeros(P, np.float32)
    policy.inputs([{"image_primary": image, "proprio": proprio}], [task])
    proprio[2] = 57.3  # degrees
    with pytest.warns(UserWarning, match=r"z is 57\.3 \(recorded -1 to 1 m\).*units and the order"):
        policy.inputs([{"image_primary": image, "proprio": proprio}], [task])
    policy.inputs([{"image_primary": image, "proprio": proprio}], [task])


def test_two_valued_targets_are_not_averaged_whether_normalised_or_not():
    run = run_of()
    (arm,) = run.embodiments
    layout = dataclasses.replace(arm.action, absolute=(True,) * A, normalized=(True,) * A)
    s, ends = arm.action_statistics, np.zeros(A, np.float32)
    two_valued = np.arange(A) == 6
    s = dataclasses.replace(
        s,
        mean=np.full(A, 31, np.float32),
        std=np.where(two_valued, 31, 5).astype(np.float32),
        **dict.fromkeys(("min", "low"), ends),
        **dict.fromkeys(("max", "high"), ends + 62),
    )
    arm = dataclasses.replace(arm, action=layout, action_statistics=s)
    policy = Policy(dataclasses.replace(run, embodiments=[arm]))
    assert policy.gripper == tuple(two_valued)
    old = dataclasses.replace(s, low=None, high=None)
    arm = dataclasses.replace(arm, action_statistics=old)
    assert not any(Policy(dataclasses.replace(run, embodiments=[arm])).gripper)


def test_a_run_with_an_unnormalised_gripper_in_percent_is_loaded_with_a_warning():
    run = run_of()
    (arm,) = run.embodiments
    s = dataclasses.replace(arm.action_statistics, max=np.full(A, 62, np.float32))
    arm = dataclasses.replace(arm, action_statistics=s)
    with pytest.warns(UserWarning, match=r"action 'gripper' is not normalised.* 0 to 62"):
        Policy(dataclasses.replace(run, embodiments=[arm]))


# Subtasks


def test_the_predicted_subtask_can_be_inspected(policy):
    run = run_of(subtask=True)
    reader = run.params["tokenizers_subtask"]["reader"]
    ((word,),) = [ids[mask] for ids, mask in zip(*HashTokenizer(8, 64).encode(["cube"]))]

    def always(number):
        changed = copy.deepcopy(run.params)
        layers = changed["tokenizers_subtask"]["reader"]
        layers["copied"]["bias"] = reader["copied"]["bias"] - 50  # words are generated
        layers["generated"]["bias"] = reader["generated"]["bias"].copy()
        layers["generated"]["bias"][number] += 50
        return Policy(dataclasses.replace(run, params=changed))

    text = "lift the cube"
    named, none, unknown = always(word), always(64), always((word + 1) % 63 + 1)
    task = named.create_task(instruction=text)
    assert named.conditioning == {"language"}
    assert named.subtask(observation(), task) == " ".join(["cube"] * 8)
    assert none.subtask(observation(), task) == ""
    assert set(unknown.subtask(observation(), task).split()) <= {"?", "the", "lift"}
    assert named.sample_actions(observation(), task).shape == (H, A), "no subtask is given"
    assert policy.subtask(observation(), policy.create_task(instruction=text)) == ""
