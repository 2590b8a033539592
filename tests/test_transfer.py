"""During and after training: gradients, effects with their significance, plan and report."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transfer_fakes import mirrored, sample

from octolike.config import Config, ConfigError, load_module, stored_config
from octolike.config.python_files import shipped_config
from octolike.envs.tabletop.tabletop_tasks import SKILLS
from octolike.evaluation import suites
from octolike.evaluation.demonstrated_episode import DemonstratedEpisode
from octolike.evaluation.statistics import OutcomeGrid
from octolike.evaluation.transfer import (
    gradient_agreement,
    group_comparison,
    study,
    transfer_effects,
    transfer_report,
)


@pytest.fixture(scope="module")
def base():
    return sample("base", 0)


def test_half_batch_cosines_are_extrapolated_to_full_batches():
    """Half batches are noisier than the full batches of the compared groups."""
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x)
    truth, halves, wholes = rng.normal(size=400), [], []
    for _ in range(300):
        a, b = (truth + 1.2 * rng.normal(size=(2, 400)) for _ in range(2))
        halves.append(unit(a[0]) @ unit(a[1]))
        wholes.append(unit(a.sum(axis=0)) @ unit(b.sum(axis=0)))
    assert np.mean(wholes) - np.mean(halves) > 0.1
    assert gradient_agreement.full_batch_cosine(np.array([np.mean(halves)]))[0] == pytest.approx(
        np.mean(wholes), abs=0.02
    )
    rows = [row(k, 0.5, within=r) for k, r in enumerate((0.4, 0.6))]
    summary = gradient_agreement.summarize("both", ("a", "b"), rows, np.nan)
    np.testing.assert_allclose(summary.within, [2 / 3, np.nan])


def row(step, cosine, within=0.5, seconds=2.0):
    matrix = [[1.0, cosine], [cosine, 1.0]]
    part = lambda c: {"cosine": [[1.0, c], [c, 1.0]], "conflict_rate": float(c < 0)}
    return {
        "step": step,
        "seconds": seconds,
        "groups": ["a", "b"],
        "cosine": matrix,
        "within": [within, None],
        "conflict_rate": float(cosine < 0),
        "modules": {"heads_action": part(cosine), "heads_own": {"cosine": [[1, None]] * 2}},
    }


def test_gradient_comparisons_are_summarised():
    rng = np.random.default_rng(0)
    cosines = np.where(np.arange(40) < 13, 0.4, -0.3) + 0.1 * rng.normal(size=40)
    rows = [row(10 * i, c) for i, c in enumerate(cosines)]
    for r in rows:
        r["modules"]["heads_own"] = {"cosine": [[1.0, None], [None, 1.0]], "conflict_rate": None}
    summary = gradient_agreement.summarize("together", ["a", "b"], rows, 3.5)
    assert summary.cosine[0, 1] == pytest.approx(cosines.mean(), abs=1e-6)
    early, *later = summary.periods
    assert [(p.first, p.last) for p in summary.periods] == [(0, 130), (140, 260), (270, 390)]
    assert early.low[0, 1] > 0
    for p in later:
        assert p.low[0, 1] < p.cosine[0, 1] < p.high[0, 1] < 0
    conflicts_found = summary.conflicting()
    assert {(x.a, x.b, x.first) for x in conflicts_found} == {("a", "b", 140), ("a", "b", 270)}
    assert "from step 140 to 260 (cosine -0.3" in " ".join(x.sentence for x in conflicts_found)
    assert 0.5 < summary.rate < 0.8
    assert list(summary.modules) == ["heads_action"]
    assert len(summary.curve) == gradient_agreement.MAX_POINTS
    assert json.dumps(summary.to_json(), allow_nan=False)
    friends = gradient_agreement.summarize(
        "x", ["a", "b"], [row(i, 0.01 * (-1) ** i) for i in range(20)], 1.0
    )
    assert friends.conflicting() == []


def test_false_conflicts_are_rare():
    rng = np.random.default_rng(0)
    runs = [
        [row(i, c) for i, c in enumerate(0.3 * rng.normal(size=30))] for _ in range(200)
    ]  # gradients that are orthogonal on average
    flagged = [
        bool(gradient_agreement.summarize("x", ["a", "b"], rows, 1.0).conflicting())
        for rows in runs
    ]
    assert np.mean(flagged) < 0.06  # 2.5 % expected


def test_the_cost_of_a_comparison_is_measured_in_steps():
    """100 steps of 0.1 s and two comparisons of 2 s between two lines of the log: 20 steps."""
    log = [{"step": s, "seconds": s * 0.1 + 2.0 * s / 50, "loss": 1.0} for s in (100, 200, 300)]
    rows = [row(s, 0.1) for s in range(0, 300, 50)]
    assert gradient_agreement.cost_in_steps(rows, log) == pytest.approx(20)
    assert np.isnan(gradient_agreement.cost_in_steps(rows, log[:1]))


def rates(*successes, episodes=50):
    """Return the outcomes of seeds with these numbers of successes, in scenes of any order."""
    rng = np.random.default_rng(successes)
    seeds = [
        dict(enumerate(rng.permutation([True] * s + [False] * (episodes - s)))) for s in successes
    ]
    return OutcomeGrid.from_seeds(seeds, dict.fromkeys(range(episodes), "skill"))


def variants(together, alone):
    """Return variants of two groups: the second is not harmed; a remedy equals single runs."""
    good = transfer_effects.GroupResult(rates(40, 41, 39), (0.3, 0.31, 0.3))
    a, alone_a = (
        transfer_effects.GroupResult(rates(*together), (0.2, 0.2)),
        transfer_effects.GroupResult(rates(*alone), (0.2, 0.2)),
    )
    return {
        "remedy": transfer_effects.VariantResults(("a", "b"), 200, {"a": alone_a, "b": good}),
        "default": transfer_effects.VariantResults(("a", "b"), 200, {"a": a, "b": good}),
        "alone": transfer_effects.VariantResults(("a",), 100, {"a": alone_a}),
        "other": transfer_effects.VariantResults(("b",), 100, {"b": good}),
    }


def test_only_significant_negative_transfer_is_reported():
    hurt = transfer_effects.estimate_effects(variants((10, 12, 11), (40, 42, 41)))
    of_a = [e for e in hurt if e.group == "a" and e.measure == "success"]
    assert [e.kind for e in of_a] == ["default", "remedy"]
    assert [e.verdict for e in of_a] == ["hurts", "undecided"]
    assert of_a[0].gain == pytest.approx(-0.6)
    assert of_a[0].sentence.startswith("a in 'default' (200 against 100 steps): worse (success 82%")
    assert {e.verdict for e in hurt if e.group == "b"} == {"undecided"}
    words = transfer_report.effects_sentence(hurt)
    assert "hurts in 1" in words
    assert "Negative transfer: a in 'default'" in words
    lucky = transfer_effects.estimate_effects(variants((38, 41, 43), (40, 42, 41)))
    assert {e.verdict for e in lucky} == {"undecided"}
    assert transfer_effects.estimate_effects({"alone": variants((1,), (1,))["alone"]}) == []


def test_seeds_that_disagree_widen_the_interval():
    """Pooled over episodes the difference is significant, over three varying seeds it is not."""
    shared, alone = (
        transfer_effects.GroupResult(rates(5, 48, 46)),
        transfer_effects.GroupResult(rates(45, 44, 46)),
    )
    d = transfer_effects.gain("success", shared, alone)
    assert d.low < 0 < d.high
    assert d.p > 0.05
    single_seed = transfer_effects.gain(
        "success", transfer_effects.GroupResult(rates(5)), transfer_effects.GroupResult(rates(45))
    )
    assert single_seed.high < 0


def test_scenes_left_out_of_an_effect_are_counted():
    """An episode of the group alone crashed in one seed."""
    seeds = [{i: i < n for i in range(50)} for n in (40, 42, 41)]
    seeds[1][7] = None
    crashed = OutcomeGrid.from_seeds(seeds, dict.fromkeys(range(50), "skill"))
    results = variants((10, 12, 11), (40, 42, 41))
    alone = {"a": transfer_effects.GroupResult(crashed, (0.2, 0.2))}
    results["alone"] = transfer_effects.VariantResults(("a",), 100, alone)
    effects = transfer_effects.estimate_effects(results)
    (of_a,) = [e for e in effects if (e.kind, e.group, e.measure) == ("default", "a", "success")]
    assert of_a.sentence.endswith("; 1 scene left out, as a side has no outcome there).")
    assert of_a.to_json()["left_out"] == 1
    assert all("left out" not in e.sentence for e in effects if e.group == "b")


def test_a_smaller_error_is_a_gain():
    with_sharing, alone = (transfer_effects.GroupResult(None, (x, x)) for x in (0.1, 0.3))
    assert transfer_effects.gain("error", with_sharing, alone).value == pytest.approx(0.2)


def make_run(directory, name, datasets, skills, wins, error=None, robots=None):
    """Write the files of a run that a study reads; robots: {name: datasets}."""
    run = directory / name
    run.mkdir(parents=True)
    plan = {"splits": ["train"], "episodes": 20, "seed": 0}
    config = {"collect": {"skills": dict.fromkeys(skills, 1)}, "workdir": str(run)}
    config |= {"environment": {"kind": "tabletop"}, "evaluate": plan, "train": {"steps": 100}}
    config["optim"] = {"warmup": 1}
    (run / "config.json").write_text(json.dumps(config))
    (run / "names.json").write_text(json.dumps({"datasets": datasets}))
    robots_of = robots or {"arm": datasets}
    records = [{"name": k, "datasets": v} for k, v in robots_of.items()]
    (run / "embodiments.json").write_text(json.dumps(records))
    for robot in robots_of:
        lines = [{"setup": {"embodiment": robot, "checkpoint": 100}}]
        for skill in skills:
            won = wins[robot] if robots else wins[skill]
            for i in range(20):
                line = {"policy": "trained", "split": "train", "skill": skill, "failure": ""}
                seed = i + suites.seed_offset("train", SKILLS.index(skill))
                lines.append(line | {"success": i < won, "seed": seed})
        folder = run / "evaluation" / (robot if robots else "")
        folder.mkdir(parents=True)
        text = "".join(json.dumps(x) + "\n" for x in lines)
        (folder / "results.jsonl").write_text(text)
    if error is not None:
        errors = {"step": 100, "errors": dict.fromkeys(datasets, error)}
        (run / transfer_effects.ERRORS).write_text(json.dumps(errors))
    return run


@pytest.fixture
def runs(tmp_path):
    """A study with three groups and two seeds; the others harm lift."""
    skills = ("touch", "push", "lift")
    plan = {"together": skills, "together_short": skills}
    plan |= {f"only_t_{s}": (s,) for s in skills}
    plan |= {f"without_t_{s}": tuple(x for x in skills if x != s) for s in skills}
    for variant, mixed in plan.items():
        for seed in range(2):
            wins = dict.fromkeys(mixed, 16 + seed) | ({"lift": 2} if len(mixed) > 1 else {})
            names = [f"t_{s}" for s in mixed]
            run = make_run(tmp_path, f"{variant}-{seed}", names, mixed, wins, 0.3 + 0.01 * seed)
            if variant == "together":
                lines = [json.dumps(row(50 * i, -0.2 + 0.02 * (-1) ** i)) for i in range(8)]
                lines = [
                    line.replace("[[1, null], [1, null]]", "[[1, null], [null, 1]]")
                    for line in lines
                ]
                (run / "conflicts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_runs_are_read_by_group(runs):
    results = transfer_effects.read_results(transfer_effects.find_runs(runs))
    assert results["together"].results["t_touch"].success.rate == 33 / 40
    assert results["together"].results["t_lift"].success.outcomes.sum() == 4
    assert results["only_t_lift"].results.keys() == {"t_lift"}
    assert results["without_t_lift"].results["t_push"].error == pytest.approx((0.3, 0.31))
    effects = transfer_effects.estimate_effects(results)
    hurts = {(e.kind, e.group) for e in effects if e.verdict == "hurts"}
    assert hurts == {("together", "t_lift"), ("together_short", "t_lift")}
    brought = [e for e in effects if e.kind == "from" and e.measure == "success"]
    assert len(brought) == 6
    assert all(e.source != e.group for e in brought)


def test_seeds_with_other_settings_are_not_mixed(runs):
    path = runs / "together-1" / "config.json"
    config = json.loads(path.read_text())
    config["evaluate"]["episodes"] = 19
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"together-1 was .* evaluate\.episodes 19, not 20;"):
        transfer_effects.read_results(transfer_effects.find_runs(runs))


def test_a_shared_run_without_single_runs_has_no_effects(tmp_path):
    wins = {"touch": 18, "push": 1}
    make_run(tmp_path, "together-0", ["t_touch", "t_push"], ("touch", "push"), wins, 0.3)
    results = transfer_effects.read_results(transfer_effects.find_runs(tmp_path))
    assert results["together"].results["t_push"] == transfer_effects.GroupResult(None, (0.3,))
    assert transfer_effects.estimate_effects(results) == []


def test_each_robot_of_a_run_has_its_own_result(tmp_path):
    both = {"tabletop": ["tabletop"], "mirrored": ["mirrored"]}
    wins = {"tabletop": 18, "mirrored": 1}
    for seed in range(2):
        make_run(tmp_path, f"default-{seed}", list(both), ("touch", "push"), wins, robots=both)
    alone = {"mirrored": ["mirrored"]}
    make_run(tmp_path, "alone-0", ["mirrored"], ("touch", "push"), {"touch": 19, "push": 18})
    results = transfer_effects.read_results(transfer_effects.find_runs(tmp_path))
    assert results["default"].results["mirrored"].success.outcomes.sum(axis=1).tolist() == [2, 2]
    assert results["default"].results["tabletop"].success.rate == 72 / 80
    (effect,) = transfer_effects.estimate_effects(results)
    assert (effect.group, effect.verdict) == ("mirrored", "hurts")
    assert alone.keys() == results["alone"].results.keys()


def test_the_report_contains_all_results(runs, base):
    study.write_comparison([base, sample("mirror", 1, mirrored), sample("far", 2, shift=9.0)], runs)
    material = study.write_report(runs)
    page = (runs / "transfer" / "report.html").read_text()
    data = json.loads((runs / "transfer" / "report.json").read_text())
    assert page.count("<img") == 4
    assert "Conflicting gradients: a and b" in page
    assert "Negative transfer: t_lift" in page.replace("\n", "")
    assert "Conflicting actions: dy" in page
    assert data["before"]["advice"][0]["verdict"] == "separate heads"
    assert data["during"]["together"]["comparisons"] == 16
    assert {e["verdict"] for e in data["after"]} == {"hurts", "undecided"}
    assert (
        group_comparison.GroupComparison.from_json(data["before"]["pairs"][0]).to_json()
        == data["before"]["pairs"][0]
    )
    for picture in ("pairs", "dimensions", "gradients_together", "effects"):
        assert (runs / "transfer" / f"{picture}.png").stat().st_size > 10_000
    assert material.names == ["base", "mirror", "far"]


def test_a_block_of_scenes_has_a_report_of_its_own(runs):
    with pytest.raises(ConfigError, match="unknown block of scenes: 'tset'"):
        study.report_folder(runs, "tset")
    with pytest.raises(ValueError, match=r"in the block test; run them: .* --block test"):
        study.write_report(runs, "test")
    for path in runs.glob("*-*/evaluation/results.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        rows = [x | {"seed": x["seed"] + suites.BLOCKS["test"], "success": True} for x in lines]
        with path.open("a") as file:
            file.write("".join(json.dumps(x) + "\n" for x in rows))
    rates = [
        e.with_
        for block in ("", "test")
        for e in study.write_report(runs, block).effects
        if (e.kind, e.group, e.measure) == ("together", "t_lift", "success")
    ]
    assert rates == [pytest.approx(0.1), 1]
    assert "the block test" in (runs / "transfer-test" / "report.html").read_text()
    assert "the block test" not in (runs / "transfer" / "report.html").read_text()


def test_a_new_study_has_a_report(tmp_path):
    study.write_report(tmp_path)
    assert "Not measured yet" in (tmp_path / "transfer" / "report.html").read_text()


@pytest.mark.parametrize(
    ("config", "variants", "effects", "scenes"),
    [("transfer", 8, 12, 50), ("conflict", 11, 18, 60)],
)
def test_the_design_of_a_study_counts_its_effects(config, variants, effects, scenes):
    module = load_module(shipped_config(config))
    text = study.design(study.plan_runs(module, "", 3), 3)
    assert text.startswith(f"design: {variants} variants, 3 seeds, {scenes} common scenes; ")
    assert f"adjusted for {effects} effects" in text
    assert "no group is trained both alone and with others" in study.design([], 3)


def test_the_plan_starts_with_the_plain_mix_and_passes_arguments():
    arguments = []
    module = SimpleNamespace(
        VARIANTS={"only_a": 0, "together": 0}, get_config=lambda arg: arguments.append(arg) or arg
    )
    runs = study.plan_runs(module, "debug", 2)
    assert [(r.variant, r.seed) for r in runs[:2]] == [("together", 0), ("only_a", 0)]
    assert arguments[0] == "debug,variant=together,seed=0"
    assert [r.variant for r in study.runs_of_stage(runs, "during")] == ["together", "together"]
    assert study.plan_runs(SimpleNamespace(), "", 3) == []


class Perfect:
    """A fake policy with an offset from the demonstration; it records its conditioning."""

    window, horizon, goal_shapes = 1, 2, {}
    observation_keys = ("proprio",)

    def __init__(self, offset):
        self.offset, self.conditions = offset, []

    def create_task(self, **conditions):
        self.conditions.append(conditions)
        return conditions

    def sample_batch(self, observations, tasks, seeds):
        assert len(observations) == len(tasks) == len(seeds)
        now = np.stack([s["proprio"][-1] for s in observations])  # which is the action, in the test
        return np.stack([now, now + 0.1], axis=1) + self.offset


def test_held_out_errors_are_in_standard_deviations_of_the_group():
    t = np.arange(8)[:, None] * np.array([[0.1, 0.1, 0.0]]) + [[0, 0, 5.0]]
    chunks = [DemonstratedEpisode({"proprio": t}, t, "go", "go/red")] * 3
    config = Config()
    config.evaluate.condition_on, config.data.tasks = ("language", "task_id"), "label"
    policy = Perfect(np.zeros(3))
    # a dimension that does not move in the demonstrations does not count
    assert transfer_effects._error(policy, "g", chunks, config) == pytest.approx(0)
    assert policy.conditions[0] == {"instruction": "go", "goal_images": None, "task_id": "go/red"}
    config.data.tasks = "dataset"
    policy = Perfect(np.array([0.2, 0.0, 9.0]))
    spread = t[:, 0].std()
    assert transfer_effects._error(policy, "g", chunks, config) == pytest.approx(0.1 / spread)
    assert policy.conditions[0]["task_id"] == "g"


@pytest.mark.parametrize("name", ["transfer", "conflict"])
@pytest.mark.parametrize("more", [(), ("debug",)])
def test_runs_with_several_groups_compare_gradients(name, more):
    module = load_module(f"configs/experiments/{name}.py")
    for variant in module.VARIANTS:
        config = module.get_config(",".join((f"variant={variant}", *more)))
        several = "," in config.data.mix
        assert bool(config.train.conflicts_every) == several, variant


def test_held_out_errors_are_repeated_after_a_change(runs, monkeypatch):
    run, calls = runs / "only_t_touch-0", []
    config = stored_config(run)
    arm = SimpleNamespace(name="arm", datasets=["t_touch"])
    loaded = SimpleNamespace(step=100, config=config, names=arm, embodiments=[arm])
    monkeypatch.setattr(transfer_effects, "load_run", lambda run, plugin_files: loaded)
    monkeypatch.setattr(transfer_effects, "Policy", lambda *args: None)
    monkeypatch.setattr(transfer_effects, "_error", lambda *args: calls.append(args) or 0.25)
    held_out = {"t_touch": [DemonstratedEpisode({}, np.zeros((3, 2), np.float32), "touch")]}
    for _ in range(2):
        transfer_effects.measure_errors(run, held_out)
    assert len(calls) == 1
    assert transfer_effects.read_results({"alone": [run]})["alone"].results["t_touch"].error == (
        0.25,
    )
    held_out["t_touch"][0].action[0] = 1
    transfer_effects.measure_errors(run, held_out)
    loaded.step = 50
    transfer_effects.measure_errors(run, held_out)
    assert len(calls) == 3
    assert transfer_effects.read_results({"alone": [run]})["alone"].results["t_touch"].error == ()
