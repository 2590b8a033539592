"""Sampling: shares, feedback to a running pipeline, tasks, hosts, memory."""

import json
import re

import numpy as np
import pytest
from data_fakes import config, numbered, opened, shown, write

from octolike import types
from octolike.config import Component, ConfigError, build_component
from octolike.data import open_data
from octolike.data.pipeline import sampling
from octolike.data.pipeline.sampling import SAMPLING, SamplingGroups, SamplingSchedule, group_dro

CAMERAS = {"fake": ["image_primary", "image_wrist"], "bridge_dataset": ["image_0", "image_1"]}
# task: (dataset, episodes, steps of each)
TASKS = {"put": ("fake", 6, 8), "push": ("fake", 2, 6), "lift": ("bridge_dataset", 3, 9)}
STEPS = {"put": 48, "push": 12, "lift": 24}  # Bridge's standardise function drops the last step
BOTH = "fake,bridge_dataset"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets with three tasks; the held-out splits have a fourth one."""
    path = tmp_path_factory.mktemp("data")
    for name, cameras in CAMERAS.items():
        tasks = {k: v for k, v in TASKS.items() if v[0] == name}
        train = [(task, steps) for task, (_, n, steps) in tasks.items() for _ in range(n)]
        episodes = [numbered(i, n, cameras, task) for i, (task, n) in enumerate(train)]
        held_out = [numbered(200, 4, cameras, "sing"), *episodes[-1:]]
        write(path, name, {"train": episodes, "val": held_out})
    return path


def make(kind, **fields):
    return build_component(SAMPLING, Component(kind=kind, **fields), "data.sampling")


def groups(**steps):
    return SamplingGroups(tuple(steps), np.array(list(steps.values())))


def shares(strategy, batch=0, feedback=(), **steps):
    schedule = SamplingSchedule(strategy, groups(**(steps or {"a": 100, "b": 300, "c": 600})))
    for results in feedback:
        schedule.feedback(batch, results)
    return schedule.shares(batch)


def equal(a, b):
    for (path, x), (_, y) in zip(types.flatten(a), types.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


STAGES = ((0, {"a": 1}), (10, {"a": 1, "[ab]": 2}), (20, {"*": 1}))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (make("proportional"), [0.1, 0.3, 0.6]),
        (make("uniform"), [1 / 3] * 3),
        (make("temperature", t=1.0), [0.1, 0.3, 0.6]),
        (make("temperature", t=2.0), np.sqrt([1, 3, 6]) / np.sqrt([1, 3, 6]).sum()),
        (make("temperature", t=1e6), [1 / 3] * 3),
        (make("mix", over="task", weights={"c": 2.0}), np.array([1, 3, 12]) / 16),
        (make("curriculum", stages=STAGES), [1, 0, 0]),
        (make("difficulty"), [1 / 3] * 3),
        (make("difficulty", base="proportional"), [0.1, 0.3, 0.6]),
        (make("group_dro", smoothing=0.0), [0.1, 0.3, 0.6]),
    ],
)
def test_shares_match_the_strategy(strategy, expected):
    np.testing.assert_allclose(shares(strategy), expected, atol=1e-5)


def test_mix_weights_are_multipliers_or_shares():
    for kind, expected in (("multipliers", [0.75, 0.25]), ("shares", [0.5, 0.5])):
        both = SamplingGroups(("a", "b"), np.array([300, 100]), np.array([1.0, 1.0]), kind)
        np.testing.assert_allclose(SamplingSchedule(make("mix"), both).shares(0), expected)


def test_stages_begin_at_their_batches():
    schedule = SamplingSchedule(make("curriculum", stages=STAGES), groups(a=100, b=300, c=600))
    actual = [schedule.shares(b).round(6).tolist() for b in range(30)]
    assert actual[:10] == [[1, 0, 0]] * 10
    # the first matching pattern counts: a is not doubled
    assert actual[10:20] == [np.round([1 / 7, 6 / 7, 0], 6).tolist()] * 10
    assert actual[20:] == [[0.1, 0.3, 0.6]] * 10
    assert [schedule.since(b) for b in (0, 9, 10, 19, 20, 29)] == [0, 0, 10, 10, 20, 20]


@pytest.mark.parametrize("pacing", ["linear", "root", "quadratic"])
def test_pacing_begins_with_the_easiest_groups_and_ends_with_all(pacing):
    names = {f"t{i}": 10 for i in range(10)}
    scores = {name: float(i) for i, name in enumerate(names)}
    strategy = make("curriculum", scores=scores, pacing=pacing, start=0.2, batches=100)
    schedule = SamplingSchedule(strategy, groups(**names))
    opened_ = [int((schedule.shares(b) > 0).sum()) for b in range(120)]
    assert opened_[0] == 2
    assert opened_[100:] == [10] * 20
    assert opened_ == sorted(opened_)
    middle = {"linear": 6, "root": 8, "quadratic": 4}[pacing]
    assert abs(opened_[50] - middle) <= 1
    for b in range(120):  # the easiest, and constant from `since` on
        assert (schedule.shares(b)[: opened_[b]] > 0).all()
        np.testing.assert_array_equal(schedule.shares(schedule.since(b)), schedule.shares(b))
        assert schedule.since(b) <= b


def test_a_target_has_its_scheduled_share_next_to_the_prior():
    strategy = make("cotrain", target="a", share=0.5)
    np.testing.assert_allclose(shares(strategy), [0.5, 0.5 / 3, 1 / 3])
    assert SamplingSchedule(strategy, groups(a=1, b=2)).since(99) == 0
    schedule = SamplingSchedule(
        make("cotrain", target="[ab]", share=0.2, final=0.8, batches=50), groups(a=1, b=3, c=6)
    )
    actual = np.array([schedule.shares(b) for b in range(80)])
    np.testing.assert_allclose(actual[0], [0.05, 0.15, 0.8])
    np.testing.assert_allclose(actual[50:], np.tile([0.2, 0.6, 0.2], (30, 1)))
    assert (np.diff(actual[:, 0]) >= 0).all()
    for b in range(80):
        np.testing.assert_array_equal(actual[schedule.since(b)], actual[b])
        assert schedule.since(b) == 0 or not np.array_equal(
            actual[schedule.since(b) - 1], actual[b]
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a 'target'"),
        ({"target": "a", "share": 1.0}, "share is 1.0; it must lie between 0 and 1"),
        ({"target": "aa"}, "unknown dataset or task in data.sampling.target: 'aa'"),
        ({"target": "*"}, "matches all groups: a, b, c; add the prior"),
    ],
)
def test_bad_targets_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        shares(make("cotrain", **fields))


def test_difficult_groups_get_larger_shares():
    strategy = make("difficulty", floor=0.1)
    actual = shares(strategy, feedback=[{"a": 0.1, "b": 0.4, "c": 0.5}])
    np.testing.assert_allclose(actual, 0.1 / 3 + 0.9 * np.array([0.1, 0.4, 0.5]), atol=1e-3)
    # groups without feedback get the mean; success is inverted
    actual = shares(make("difficulty", floor=0.0), feedback=[{"a": 0.2, "b": 0.6}])
    np.testing.assert_allclose(actual, [1 / 6, 1 / 2, 1 / 3], atol=1e-3)
    actual = shares(
        make("difficulty", measure="success", floor=0.0), feedback=[{"a": 0.9, "b": 0.5}]
    )
    np.testing.assert_allclose(actual, np.array([0.1, 0.5, 0.3]) / 0.9, atol=1e-3)
    # no difficulty at all; smoothing keeps part of the old value
    np.testing.assert_allclose(shares(strategy, feedback=[dict.fromkeys("abc", 0.0)]), 1 / 3)
    smooth = make("difficulty", floor=0.0, smoothing=0.5)
    twice = [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 3.0}]
    np.testing.assert_allclose(shares(smooth, feedback=twice), [0.5, 0.25, 0.25], atol=1e-3)


def test_group_dro_moves_towards_the_worst_group():
    start = np.array([0.25, 0.25, 0.5])
    actual = group_dro(np.array([0.0, 1.0, -3.0]), start, 1.0, 0.0)
    grown = start * np.exp([0, 1, 0])  # a negative excess counts as 0
    np.testing.assert_allclose(actual, grown / grown.sum())
    smoothed = group_dro(np.array([0.0, 1.0, 0.0]), start, 1.0, 0.3)
    np.testing.assert_allclose(smoothed, 0.7 * grown / grown.sum() + 0.1)
    np.testing.assert_allclose(group_dro(np.zeros(3), start, 5.0, 0.0), start)
    assert group_dro(np.array([1e4, 0, 0]), start, 10.0, 0.0) == pytest.approx([1, 0, 0])
    # many small steps with a constant excess end at the worst group; feedback does the same
    weights = start
    for _ in range(100):
        weights = group_dro(np.array([0.1, 0.3, 0.2]), weights, 1.0, 0.0)
    assert weights.argmax() == 1
    assert weights[1] > 0.99
    rounds = [{"a": 0.1, "b": 0.3, "c": 0.2}] * 100
    actual = shares(make("group_dro", smoothing=0.0), feedback=rounds, a=25, b=25, c=50)
    np.testing.assert_allclose(actual, weights, atol=1e-3)


def test_a_schedule_is_restored_from_its_state_at_older_positions_too():
    first = SamplingSchedule(make("difficulty"), groups(a=1, b=1, c=2))
    assert first.feedback(5, {"a": 0.123456, "b": 3.0})
    assert first.feedback(9, {"a": 7.0})
    second = SamplingSchedule(
        make("difficulty"), groups(a=1, b=1, c=2), json.loads(json.dumps(first.state()))
    )
    for batch in range(5, 15):
        np.testing.assert_array_equal(first.shares(batch), second.shares(batch))
        assert first.since(batch) == second.since(batch) == (9 if batch >= 9 else 5)
    assert not first.feedback(12, {})
    assert not SamplingSchedule(make("uniform"), groups(a=1)).feedback(3, {"a": 1.0})


def test_a_state_stays_small_with_ten_thousand_tasks():
    names = {f"task number {i}": i + 1 for i in range(10_000)}
    schedule = SamplingSchedule(make("difficulty", over="task"), groups(**names))
    rng = np.random.default_rng(0)
    for batch in range(6):
        drawn = rng.choice(list(names), 300)
        schedule.feedback(batch, dict(zip(drawn, rng.random(300).tolist(), strict=True)))
    assert len(json.dumps(schedule.state())) < 12_000
    schedule = SamplingSchedule(make("uniform", over="task"), groups(**names))
    assert len(json.dumps(schedule.state())) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "unifrom"}, r"kind at data.sampling: 'unifrom'; did you mean 'uniform'"),
        ({"kind": "uniform", "over": "tasks"}, r"sampling.over: 'tasks'; did you mean 'task'"),
        ({"kind": "uniform", "t": 2}, "unknown field"),
        ({"kind": "temperature", "t": 0}, r"sampling\.t is 0; it must be at least 0\.001"),
        ({"kind": "mix", "over": "task", "weights": {"a": 0}}, "weight 0 of 'a' must be a posit"),
        ({"kind": "mix", "over": "task", "weights": {"a": -1}}, "weight -1 of 'a' must be a pos"),
        ({"kind": "mix", "over": "task", "weights": {"a": float("nan")}}, "weight nan of 'a'"),
        ({"kind": "mix", "over": "task", "weights": {"alfa": 1}}, "did you mean 'alpha'"),
        ({"kind": "curriculum"}, "needs either 'stages' or 'scores'"),
        ({"kind": "curriculum", "stages": ((5, {"b": 1}),)}, r"begin at batches \[5\]"),
        ({"kind": "curriculum", "stages": ((0, {}),)}, "stage from batch 0 is empty"),
        ({"kind": "curriculum", "stages": ((0, {"b": -1}),)}, "weight -1 of 'b'"),
        ({"kind": "curriculum", "stages": ((0, {"b": 1}), (9, {"alphas": 1}))}, "mean 'alpha'"),
        ({"kind": "curriculum", "scores": {"b": 1}}, "no difficulty for 'alpha'"),
        ({"kind": "curriculum", "scores": {"c": 1, "*": 2}}, "dataset or task in .*scores: 'c'"),
        ({"kind": "curriculum", "scores": {"*": 1}, "pacing": "fast"}, "sampling.pacing: 'fast'"),
        ({"kind": "curriculum", "scores": {"*": 1}, "start": 0}, "start is 0"),
        ({"kind": "difficulty", "measure": "loss"}, r"sampling\.measure: 'loss' \(choices: error"),
        ({"kind": "difficulty", "floor": 2}, r"floor is 2; it must lie in \[0, 1\]"),
    ],
)
def test_invalid_strategies_are_rejected(fields, message):
    with pytest.raises(ConfigError, match=message):
        SamplingSchedule(make(**fields), groups(alpha=3, b=1))


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"alfa": 1.0}, "dataset or task in feedback: 'alfa'; did you mean 'alpha'"),
        ({"alpha": float("nan")}, "feedback for 'alpha' is nan"),
        ({"alpha": -1.0}, "expects errors of at least 0"),
    ],
)
def test_invalid_feedback_is_rejected(results, message):
    schedule = SamplingSchedule(make("difficulty"), groups(alpha=3, b=1))
    with pytest.raises(ConfigError, match=message):
        schedule.feedback(0, results)
    rates = SamplingSchedule(make("difficulty", measure="success"), groups(alpha=3))
    with pytest.raises(ConfigError, match=r"expects rates in \[0, 1\]"):
        rates.feedback(0, {"alpha": 1.5})


def test_many_tasks_give_a_short_table():
    many = groups(**{f"t{i}": i + 1 for i in range(50)})
    lines = sampling.describe_shares(
        many, SamplingSchedule(make("uniform"), many).shares(0), "task"
    ).splitlines()
    assert lines[0].split() == ["task", "steps", "share"]
    assert len(lines) == 22
    assert lines[-1].startswith("and 30 more: ")


STRATEGIES = [
    {"kind": "mix"},
    {"kind": "mix", "weights": {"push": 3.0}},
    {"kind": "proportional"},
    {"kind": "uniform"},
    {"kind": "temperature", "t": 3.0},
    {"kind": "curriculum", "stages": ((0, {"*u*": 1}), (30, {"*": 1}))},
    {"kind": "curriculum", "scores": {"push": 1, "*": 2}, "batches": 40},
    {"kind": "difficulty"},
    {"kind": "group_dro"},
]


@pytest.fixture(scope="module")
def by_group(root):
    """{"dataset", "task": data sampled by it}; the graph does not depend on the strategy."""
    return {
        over: opened(
            root, BOTH, cameras={}, sampling=Component(kind="mix", over=over), batch_size=30
        )
        for over in ("dataset", "task")
    }


@pytest.mark.parametrize("fields", STRATEGIES, ids=lambda f: "-".join(map(str, f)))
@pytest.mark.parametrize("over", ["dataset", "task"])
def test_realised_shares_match_the_planned_ones(by_group, over, fields):
    if over == "dataset":
        fields = json.loads(json.dumps(fields).replace("push", "fake").replace("*u*", "f*"))
        fields.pop("weights", None)
    data = by_group[over]
    data._strategy = make(over=over, **fields)
    stream, planned, drawn = data.train(), [], []
    for i in range(60):
        if i == 20 and fields["kind"] in ("difficulty", "group_dro"):
            stream.feedback({"fake": 1.0, "bridge_dataset": 2.0}, {"put": 1.0, "lift": 3.0})
        planned.append(list(stream.shares().values()))
        batch = next(stream)
        drawn.append(batch["task"]["task_id"] if over == "task" else batch["dataset"])
    names = data.tasks if over == "task" else data.datasets
    assert list(stream.shares()) == list(names)
    actual = np.bincount(np.concatenate(drawn), minlength=len(names)) / 1800
    np.testing.assert_allclose(actual, list(stream.realised().values()))
    np.testing.assert_allclose(actual, np.mean(planned, 0), atol=0.03)
    stream.close()


def test_feedback_changes_a_running_pipeline_and_resumes_exactly(root):
    settings = {"sampling": Component(kind="difficulty", over="task", floor=0.0), "batch_size": 30}
    settings |= {"cameras": {"primary": 8}, "keep_language": 0.5, "goal": "uniform"}
    data = opened(root, BOTH, **settings)
    stream, batches, states = data.train(), [], []
    for i in range(24):
        if i in (6, 15):
            position = states[-2] if i == 15 else states[-1]
            good = "put" if i == 6 else "push"
            stream.feedback({}, {"put": 1.0, "push": 1.0, "lift": 1.0, "sing": 9.0} | {good: 0.0})
            late = stream.state_at(position)
        batches.append(next(stream))
        states.append(json.loads(json.dumps(stream.state())))
    counts = np.stack([np.bincount(b["task"]["task_id"], minlength=3) for b in batches])
    assert data.tasks == ("put", "push", "lift")
    assert not counts[6:15, 0].any()
    assert not counts[15:, 1].any()
    assert (counts[[*range(6), *range(15, 24)], 0] > 0).all()
    # prefetching does not delay the effect
    for prefetch, at, state in ((0, 3, states[2]), (4, 9, states[8]), (1, 14, late)):
        again = opened(root, BOTH, prefetch=prefetch, **settings).train(state)
        for i in range(at, 24):
            if i in (6, 15) and not (i == 15 and state is late):
                good = "put" if i == 6 else "push"
                again.feedback({}, {"put": 1.0, "push": 1.0, "lift": 1.0} | {good: 0.0})
            equal(next(again), batches[i])
        again.close()


def test_the_union_over_hosts_is_the_order_of_one_host(root):
    settings = {"batch_size": 12, "pool": 3, "keep_language": 0.5, "goal": "uniform", "lanes": 3}
    data = opened(root, BOTH, **settings)
    single = data.train()
    parts = [opened(root, BOTH, **settings).train(process=(i, 3)) for i in range(3)]
    for _ in range(10):
        actual = [next(part) for part in parts]
        joined = {k: [] for k, _ in types.flatten(actual[0])}
        for batch in actual:
            for path, leaf in types.flatten(batch):
                assert len(leaf) == 4
                joined[path].append(leaf)
        equal(next(single), types.unflatten({k: np.concatenate(v) for k, v in joined.items()}))
    assert len({json.dumps(part.state()) for part in (*parts, single)}) == 1
    with pytest.raises(ConfigError, match=r"process 0 of 5 has no part of the 3 lanes of a batch"):
        data.train(process=(0, 5))


def test_tasks_have_ids_and_conditioning_is_never_all_dropped(root):
    settings = {"task_ids": True, "keep_task_id": 0.3, "keep_language": 0.3, "keep_goal": 0.3}
    data = opened(root, BOTH, batch_size=200, goal="uniform", **settings)
    assert data.names == types.Names(("fake", "bridge_dataset"), tuple(data.datasets), data.tasks)
    batch = next(data.train())
    present = batch["task"]["present"]
    conditioning = np.stack([present["language"], present["image_primary"], present["task_id"]])
    assert conditioning.any(0).all()
    assert 0.2 < present["task_id"].mean() < 0.4
    lift = batch["dataset"] == 1
    np.testing.assert_array_equal(batch["task"]["task_id"] == 2, lift)
    off = next(opened(root, BOTH, batch_size=200).train())["task"]
    assert not off["present"]["task_id"].any()
    assert set(off["task_id"]) == {0, 1, 2}  # the id itself stays in the batch
    # a task that is not in training
    val = next(data.validation()["fake"]())
    strange = np.array(shown(val["observation"]["image_primary"]))[:, 0, 0] == 200
    assert strange.any()
    np.testing.assert_array_equal(val["task"]["task_id"] == 3, strange)
    np.testing.assert_array_equal(val["task"]["present"]["task_id"], ~strange)


def test_a_dataset_can_be_a_task(root):
    data = opened(root, BOTH, tasks="dataset")
    assert data.tasks == ("fake", "bridge_dataset")
    batch = next(data.train())
    np.testing.assert_array_equal(batch["task"]["task_id"], batch["dataset"])


def test_paraphrases_are_as_frequent_as_the_original_and_absent_in_validation(root, tmp_path):
    path = tmp_path / "paraphrases.json"
    path.write_text(json.dumps({"put": ["place it", "set down"], "dance": ["step"]}))
    data = opened(root, batch_size=300, paraphrases=str(path))
    assert "paraphrases: 1 of 2 distinct instructions" in data.describe()
    texts = {
        name: tuple(data._wording.text.encode([name])[0][0]) for name in ("put", "place it", "push")
    }
    texts["set down"] = tuple(data._wording.text.encode(["set down"])[0][0])
    batch = next(data.train())
    ids = [tuple(x) for x in batch["task"]["language"]["ids"]]
    puts = batch["task"]["task_id"] == 0
    for name in ("put", "place it", "set down"):
        assert np.mean([x == texts[name] for x in ids]) == pytest.approx(puts.mean() / 3, abs=0.09)
    assert {x for x, put in zip(ids, puts, strict=True) if not put} == {texts["push"]}
    plain = opened(root, batch_size=300)
    for (a, b), changes in ((next(zip(d.train(), plain.train())), c) for d, c in ((data, True),)):
        np.testing.assert_array_equal(a["action"], b["action"])
        assert (a["task"]["language"]["ids"] != b["task"]["language"]["ids"]).any() == changes
    equal(*(next(d.validation()["fake"]()) for d in (data, plain)))
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        opened(root, paraphrases=str(path))


def test_the_tables_show_the_configured_shares(root):
    table = opened(root, BOTH, sampling=Component(kind="uniform", over="task")).describe()
    assert [row.split() for row in table.splitlines()[-4:]] == [
        ["task", "steps", "share"],
        *[[name, str(STEPS[name]), "33.33%"] for name in ("put", "push", "lift")],
    ]
    assert table.splitlines()[1].split()[3] == "66.7%"  # two of the three tasks


def test_a_budget_without_room_for_an_episode_is_rejected_with_the_need(root):
    with pytest.raises(
        ConfigError, match=r"largest episode of .* set data.memory to at least"
    ) as e:
        opened(root, BOTH, memory=4e-6)
    need = float(re.search(r"at least (\S+),", str(e.value))[1])
    opened(root, BOTH, memory=need * 1.01)
    with pytest.raises(ConfigError, match=r"data\.memory is 0"):
        config(root, BOTH, memory=0)


def test_data_without_cameras_are_supported(root):
    data = open_data(config(root, BOTH, cameras={}, use_proprio=False))
    types.check_batch(next(data.train()), data.spec)
