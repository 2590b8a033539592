"""The comparison of runs: pooling over seeds, order, skills, robots, missing episodes."""

import json
import re
import shutil

import pytest

from octolike.config import Config
from octolike.envs.tabletop.tabletop_tasks import SKILLS
from octolike.evaluation import comparison, statistics, study_design, suites
from octolike.evaluation.contrasts import Question
from octolike.evaluation.statistics import SuccessRate
from octolike.evaluation.study_design import SignFlipProcess, detectable_difference


def table_lines(summaries, *question):
    """Return the lines of the Markdown table without padding."""
    text = comparison.table(summaries, Question(*question))
    return [re.sub(" +", " ", x) for x in text.splitlines()]


def make_run(directory, name, wins, error=0.2, costs=True):
    run = directory / name
    rows = [r for s, n in wins.items() for r in episodes("touch", n, split=s)]
    add_rows(run / "evaluation", [*rows, rows[-1] | {"policy": "untrained", "success": True}])
    write_config(run, wins, ("touch",))
    log = [{"step": s, "seconds": 0.05 * s, "loss": 1.0} for s in (10, 20, 30)]
    log.append({"step": 30, "seconds": 9.0, "validation/table/action_error": error})
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    if costs:
        (run / "costs.json").write_text('{"parameters": 2000000, "flops_per_step": 3e9}')


def test_seeds_are_pooled_and_variants_ordered(tmp_path):
    make_run(tmp_path, "default-0", {"train": 1, "held_out_combination": 0}, 0.3)
    make_run(tmp_path, "default-1", {"train": 2, "held_out_combination": 1}, 0.1)
    make_run(tmp_path, "moe-0", {"train": 4})
    make_run(tmp_path, "goal-image-0", {"train": 3}, costs=False)
    summaries = comparison.read(tmp_path)
    assert [e.variant for e in summaries] == ["default", "goal-image", "moe"]
    default = summaries[0]
    assert (default.pooled("train").successes, default.pooled("train").episodes) == (3, 8)
    assert default.step_seconds == pytest.approx((0.05, 0.05))
    lines = table_lines(summaries)
    assert lines[2].startswith("| default | 2 | 38 % [1 %, 97 %]; seeds 25 % to 50 % |")
    assert "| 0.200 | 2.00 M | 3.00 | 50 |" in lines[2]
    assert [line.split()[1] for line in lines[3:5]] == ["moe", "goal-image"]
    assert "| 75 % [3 %, 100 %] | – | a | +38 [-100, +100], p " in lines[4]
    assert lines[4].endswith("| 0.200 | – | – | 50 |")
    assert "| letters | minus default |" in lines[0]
    assert "| a | +62 [" in lines[3]
    text = " ".join(lines)
    assert "over training seeds and scenes" in text
    assert "Holm over 3 pairs" in text
    picture = comparison.draw(summaries, tmp_path / "comparison.png")
    assert picture.stat().st_size > 5000


def test_demonstrations_alone_that_others_are_worth_are_noted(tmp_path):
    """alone_10 wins 1 of 4, alone_40 3 of 4: 2 of 4 are worth 20, and 4 of 4 more than 40."""
    wins = {"alone_10": 1, "alone_40": 3, "cotrain_10": 2, "finetune_10": 4, "prior": 2}
    for seed in range(2):
        for name, n in wins.items():
            make_run(tmp_path, f"{name}-{seed}", {"train": n})
    text = comparison.table(comparison.read(tmp_path))
    note = next(x for x in text.splitlines() if x.startswith("Equivalent demonstrations"))
    assert "between alone_10, alone_40: " in note
    assert "cotrain_10 20 [below 10, above 40]" in note
    assert "finetune_10 above 40 [" in note
    assert "prior" not in note
    make_run(tmp_path, "alone_10-2", {"train": 1})
    assert "none yet, alone_<count> have unequal seeds" in comparison.table(
        comparison.read(tmp_path)
    )


def test_a_study_stops_when_its_evidence_suffices(tmp_path):
    """Eight seeds on which one variant always wins decide; a tie never does."""
    for seed in range(8):
        make_run(tmp_path, f"default-{seed}", {"train": 1})
        make_run(tmp_path, f"better-{seed}", {"train": 3 + seed % 2})
        make_run(tmp_path, f"equal-{seed}", {"train": seed % 3})
    make_run(tmp_path, "late-9", {"train": 1})
    evidence = study_design.evidence(comparison.read(tmp_path), Question())
    assert set(evidence) == {"better", "equal"}
    assert evidence["better"].seeds == 8
    assert evidence["better"].p < 0.05 / 2
    assert evidence["equal"].p > 0.2
    assert study_design.evidence(comparison.read(tmp_path), Question("late")) == {}


def test_variants_without_a_common_scene_are_never_decided(tmp_path):
    for seed in range(8):
        make_run(tmp_path, f"default-{seed}", {"train": 0})
        make_run(tmp_path, f"better-{seed}", {"train": 4})
        make_run(tmp_path, f"elsewhere-{seed}", {"held_out_combination": 4})
    decided, text = study_design.decided(tmp_path, ("default", "better", "elsewhere"), Question())
    assert decided == {"better"}
    assert re.search(r"better against default after 8 seeds: p = .*Holm over 2: decided", text)
    assert "elsewhere shares no scene and seed with default: not decided" in text
    chosen = study_design.decided(tmp_path, ("better",), Question())  # the reference's runs exist
    assert chosen[0] == {"better"}
    decided, text = study_design.decided(tmp_path, ("better",), Question("late"))
    assert decided == set()
    assert text == "better shares no scene and seed with late: not decided"


def test_evidence_comes_from_the_first_split_that_both_have(tmp_path):
    """As a variant has that is trained for the second of two robots alone."""
    for seed in range(8):
        make_run(tmp_path, f"default-{seed}", {"train": 4, "held_out_combination": 0})
        make_run(tmp_path, f"better-{seed}", {"held_out_combination": 4})
    evidence = study_design.evidence(comparison.read(tmp_path), Question())
    assert evidence["better"].seeds == 8
    assert evidence["better"].p < 0.05


def test_evidence_pairs_the_seeds_of_the_split_that_is_asked(tmp_path):
    """Seed 0 of the better variant lacks the split: its seed 1 meets seed 1, not seed 0."""
    for seed in range(3):
        lost = {"train": 4, "held_out_combination": 2 * (seed > 1)}
        make_run(tmp_path, f"default-{seed}", lost)
        make_run(tmp_path, f"better-{seed}", {"train": 0, "held_out_combination": 2})
    seen_alone = episodes("touch", 0)  # the evaluation of seed 0 is not finished
    add_rows(tmp_path / "better-0" / "evaluation", seen_alone)
    question = Question(split="held_out_combination")
    process = study_design.evidence(comparison.read(tmp_path), question)["better"]
    assert process.seeds == 2
    expected = SignFlipProcess()
    for difference in (0.5, 0.0):
        expected.update(difference)
    assert process.p == expected.p


def test_a_study_says_when_its_seeds_cannot_decide_early():
    """Evidence doubles at most with a seed; of nine comparisons the first needs p = 0.05 / 9."""
    configs = {f"v{i}": design_config() for i in range(9)} | {"default": design_config()}
    assert study_design.seeds_to_decide(len(configs)) == 9
    text = study_design.sentence(configs, 8, Question(), until_decided=True)
    assert text.endswith("with --seeds 8 nothing is decided early, and all seeds are run")
    text = study_design.sentence(configs, 9, Question(), until_decided=True)
    assert text.endswith("decides from 9 seeds on, if all have one sign")
    process = SignFlipProcess()
    for _ in range(8):
        process.update(1.0)
    assert process.p == pytest.approx(SignFlipProcess.smallest_p(8), rel=0.02)
    assert process.p > 0.05 / 9


def test_the_table_answers_the_question_of_the_study(tmp_path):
    """On held-out tasks against `narrow`; on seen tasks all are equal."""
    for seed in range(3):
        for name, wins in (("narrow", 0), ("broad", 4), ("same", 0)):
            make_run(tmp_path, f"{name}-{seed}", {"train": 2, "held_out_combination": wins})
    lines = table_lines(comparison.read(tmp_path), "narrow", "held_out_combination")
    assert "| letters | minus narrow |" in lines[0]
    assert [line.split()[1] for line in lines[2:5]] == ["narrow", "broad", "same"]
    assert "| a | – |" in lines[2]
    assert "| a | +100 [" in lines[3]
    text = " ".join(lines)
    assert "Letters (held-out combination): " in text
    assert "Differences to narrow (held-out combination): Holm over 2." in text
    gaps = "broad on held-out combination +50.0 ["
    assert "Points more than on seen tasks of the same skills, with 95 % intervals over" in text
    assert gaps in text
    with pytest.raises(ValueError, match=r"'held_out_family', where .* compared; these were: t"):
        table_lines(comparison.read(tmp_path), "narrow", "held_out_family")
    note = "No column of differences, as no variant is named 'default'; --against names another."
    assert note in table_lines(comparison.read(tmp_path))
    text = comparison.write(tmp_path, Question(), names=("narrow",), evidence="p = 0.01")
    assert "broad" not in text
    assert "these p-values hold, not those of the table:\n\np = 0.01" in text


def test_held_out_tasks_are_set_against_seen_ones_of_the_same_skills(tmp_path):
    """Touching always succeeds and lifting, the only held-out skill, never does."""
    for seed in range(2):
        make_run(tmp_path, f"default-{seed}", {"train": 0, "held_out_family": 0})
        write_config(tmp_path / f"default-{seed}", ("train", "held_out_family"), ("touch", "lift"))
        rows = [*episodes("touch", 4), *episodes("lift", 0)]
        rows += episodes("lift", 0, split="held_out_family")
        add_rows(tmp_path / f"default-{seed}" / "evaluation", rows)
    text = " ".join(table_lines(comparison.read(tmp_path)))
    assert "default on held-out family +0.0 [" in text
    for seed in range(2):
        rows = [*episodes("touch", 4), *episodes("lift", 0, split="held_out_family")]
        add_rows(tmp_path / f"default-{seed}" / "evaluation", rows)
    assert "Points more than" not in comparison.table(comparison.read(tmp_path))


def test_a_study_is_named_by_its_config_file(tmp_path):
    path = tmp_path / "study.py"
    path.write_text('REFERENCE, SPLIT = "alone_80", "held_out_combination"\n')
    stated = Question("alone_80", "held_out_combination")
    assert study_design.question(f"{path}:debug") == stated
    assert study_design.question(str(path), "b", "train") == Question("b", "train")
    assert study_design.question("") == Question()


def test_equality_is_stated_only_if_it_is_shown(tmp_path):
    """400 scenes of each of three seeds at the same rate, or 4 of each."""
    for seed in range(3):
        for name in ("default", "same"):
            make_run(tmp_path / "few", f"{name}-{seed}", {"train": 2})
            run = tmp_path / "many" / f"{name}-{seed}"
            make_run(tmp_path / "many", f"{name}-{seed}", {"train": 2})
            add_rows(run / "evaluation", episodes("touch", 200, count=400))
            stored = json.loads((run / "config.json").read_text())
            stored["evaluate"]["episodes"] = 400
            (run / "config.json").write_text(json.dumps(stored))
    few, many = (" ".join(table_lines(comparison.read(tmp_path / x))) for x in ("few", "many"))
    assert "5 % for each): none is shown to be." in few
    assert "Equal to it within 10 points (two one-sided tests, 5 % for each): same." in many


def test_a_run_without_a_number_is_a_seed_of_those_beside_it(tmp_path):
    """As the quick start's: runs/quickstart has seed 0, runs/quickstart-1 seed 1."""
    make_run(tmp_path, "default", {"train": 3})
    make_run(tmp_path, "default-1", {"train": 1})
    make_run(tmp_path, "default-10", {"train": 2})
    (summary,) = comparison.read(tmp_path)
    assert summary.seeds["train"] == ("0", "1", "10")
    assert [r.successes for r in summary.success["train"]] == [3, 1, 2]


def test_a_run_without_a_seed_is_left_out_and_named(tmp_path, capsys):
    make_run(tmp_path, "default-0", {"train": 1})
    make_run(tmp_path, "default-old", {"train": 4})
    (summary,) = comparison.read(tmp_path)
    assert (summary.variant, summary.seeds["train"]) == ("default", ("0",))
    assert f"{tmp_path / 'default-old'} is left out" in capsys.readouterr().out


def test_a_block_of_scenes_has_a_table_of_its_own(tmp_path, capsys):
    make_run(tmp_path, "default-0", {"train": 0})
    evaluation = tmp_path / "default-0" / "evaluation"
    with pytest.raises(ValueError, match=r"in the block test; run them: .*default-0 --block test"):
        comparison.read(tmp_path, "test")
    first = suites.BLOCKS["test"]
    test = [r | {"seed": r["seed"] + first} for r in episodes("touch", 3)]
    add_rows(evaluation, [*episodes("touch", 1), *test])
    pooled = [comparison.read(tmp_path, x)[0].pooled("train").successes for x in ("", "test")]
    assert pooled == [1, 3]
    make_run(tmp_path, "default-1", {"train": 0})
    make_run(tmp_path, "other-0", {"train": 0})
    (without,) = comparison.read(tmp_path, "test")  # those runs have no episode of the block yet
    assert (without.variant, without.seeds["train"]) == ("default", ("0",))
    notes = capsys.readouterr().out.splitlines()
    assert [re.search(r"(default-1|other-0) --block test", x) is not None for x in notes] == [1, 1]
    shutil.rmtree(tmp_path / "default-1")
    shutil.rmtree(tmp_path / "other-0")
    (few,) = comparison.read(tmp_path, "test", episodes=2)
    assert (few.pooled("train").successes, few.pooled("train").episodes) == (2, 2)
    assert "Scenes: the block test." in comparison.write(tmp_path, block="test")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"default-0", "comparison-test.md", "comparison-test.png"}


SEEN_LAST = ("held_out_combination", "train")


@pytest.mark.parametrize(
    ("setup", "plan", "message"),
    [
        ({"execution": {"execute": 2}}, {}, "execution {'execute': 2}, not None"),
        ({}, {"episodes": 3}, r"evaluate\.episodes 3, not 4"),
        ({"checkpoint": 60}, {}, "checkpoint 60, not 30"),
    ],
)
def test_seeds_with_other_settings_are_not_mixed(tmp_path, setup, plan, message):
    """More steps, another execution, other episodes; variants may differ in all of them."""
    for name in ("default-0", "other-0", "default-1"):
        make_run(tmp_path, name, {"train": 1})
    for name in ("other-0", "default-1"):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["train"]["steps"] = setup.get("checkpoint", 30)
        config["evaluate"] |= plan
        path.write_text(json.dumps(config))
        add_rows(tmp_path / name / "evaluation", episodes("touch", 1), setup)
    expected = f"default-1 was trained .* other settings than .*default-0, .*: {message}; train"
    with pytest.raises(ValueError, match=expected):
        comparison.read(tmp_path)
    shutil.rmtree(tmp_path / "default-1")
    assert len(comparison.read(tmp_path)) == 2


def design_config(episodes=60, splits=("train", "held_out_combination")):
    config = Config(environment={"kind": "tabletop"})
    config.evaluate.episodes, config.evaluate.splits = episodes, splits
    config.evaluate.skills = ("touch",)
    return config


@pytest.mark.parametrize(
    ("variants", "scenes", "pairs"),
    [
        ({"default": {}, "same": {}, "short": {"episodes": 20}}, 20, "2 comparisons"),
        (
            {"default": {}, "other": {"splits": ("held_out_combination",)}, "same": {}},
            60,
            "1 comparison",
        ),
        ({"default": {"splits": SEEN_LAST}, "a": {}, "b": {}}, 60, "2 comparisons"),
        ({"default": {}}, 60, "1 comparison"),
    ],
)
def test_the_design_counts_the_scenes_that_all_pairs_meet(variants, scenes, pairs):
    configs = {name: design_config(**fields) for name, fields in variants.items()}
    text = study_design.sentence(configs, 3, Question())
    assert text.startswith(f"design: {len(configs)} variants, 3 seeds, {scenes} common scenes; ")
    assert f"(adjusted for {pairs};" in text
    smallest = detectable_difference(3, scenes, int(pairs.split()[0]), len(configs))
    assert f"at least {100 * smallest:.0f} points" in text
    assert study_design.sentence(configs, 1, Question()).endswith(
        "one seed compares policies, not recipes"
    )
    configs["default"].environment = {}
    assert study_design.sentence(configs, 3, Question()).endswith("3 seeds, no simulator")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with the setup of an evaluation"),
        ('{"rows": 3}\n', "does not begin with the setup of an evaluation"),
        ('{"setup": {"checkpoint": 30, "embodiment": "arm"}}\n{"policy\n', "line 2, is not JSON"),
    ],
)
def test_malformed_results_are_named(tmp_path, text, message):
    make_run(tmp_path, "default-0", {"train": 1})
    path = tmp_path / "default-0" / "evaluation" / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        comparison.read(tmp_path)


def test_scenes_without_an_outcome_of_every_seed_are_named(tmp_path):
    make_run(tmp_path, "default-0", {"train": 2})
    make_run(tmp_path, "default-1", {"train": 2})
    add_rows(tmp_path / "default-1" / "evaluation", episodes("touch", 2)[:3])
    summaries = comparison.read(tmp_path)
    assert summaries[0].grids["train"].outcomes.tolist() == [[1, 1, 0], [1, 1, 0]]
    text = comparison.table(summaries)
    assert text.endswith("as a seed has no outcome there: default 1.")


SAME_DATA = "were trained on the same demonstrations: intervals do not cover other demonstrations."


def test_seeds_that_share_their_demonstrations_are_named(tmp_path):
    """Only a does: b has a directory of data per seed, c another draw, d a single seed."""
    data = {
        "a-0": ({}, {}),
        "a-1": ({}, {}),
        "b-0": ({"root": "data/0"}, {}),
        "b-1": ({"root": "data/1"}, {}),
        "c-0": ({}, {}),
        "c-1": ({}, {"draw": 1}),
        "d-0": ({}, {}),
    }
    for name, (of_data, collect) in data.items():
        make_run(tmp_path, name, {"train": 1})
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text()) | {"data": of_data, "collect": collect}
        path.write_text(json.dumps(config))
    summaries = comparison.read(tmp_path)
    assert f"All seeds of a {SAME_DATA}" in table_lines(summaries)
    assert f"All seeds {SAME_DATA}" in table_lines([summaries[0], summaries[3]])
    assert SAME_DATA not in comparison.table(summaries[1:])


def test_a_directory_without_evaluated_runs_is_rejected(tmp_path):
    (tmp_path / "default-0").mkdir()
    with pytest.raises(FileNotFoundError, match="no evaluated run <variant>-<seed>"):
        comparison.read(tmp_path)


def add_rows(run, rows, setup=None):
    run.mkdir(parents=True, exist_ok=True)
    head = {"setup": {"checkpoint": 30, "embodiment": "arm"} | (setup or {})}
    (run / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (head, *rows)))


def episodes(skill, wins, count=4, split="train"):
    row = {"policy": "trained", "split": split, "skill": skill, "failure": ""}
    first = suites.seed_offset(split, SKILLS.index(skill))
    return [row | {"seed": first + i, "success": i < wins} for i in range(count)]


def write_config(run, splits, skills):
    plan = {"splits": list(splits), "skills": list(skills), "episodes": 4, "seed": 0}
    config = {"environment": {"kind": "tabletop"}, "evaluate": plan, "train": {"steps": 30}}
    config |= {"optim": {"warmup": 1}, "workdir": str(run)}
    (run / "config.json").write_text(json.dumps(config))


def test_skills_have_columns_and_the_worst_skill_is_named(tmp_path):
    make_run(tmp_path, "default-0", {"train": 0})
    write_config(tmp_path / "default-0", ("train",), ("touch", "lift"))
    add_rows(tmp_path / "default-0" / "evaluation", episodes("touch", 3) + episodes("lift", 1))
    head, _, line, *notes = table_lines(comparison.read(tmp_path))
    assert any(note.startswith("One training seed per variant: the intervals") for note in notes)
    assert "| seen | touch | lift | worst skill | mean over skills |" in head
    assert "| 75 % [30 %, 95 %] | 25 % [5 %, 70 %] | lift 25 % | 50 % |" in line


def test_intervals_of_skills_cover_training_seeds(tmp_path):
    """Lifts succeed always in one seed and never in the other; one of them crashes."""
    for seed in range(2):
        make_run(tmp_path, f"default-{seed}", {"train": 0})
        write_config(tmp_path / f"default-{seed}", ("train",), ("touch", "lift"))
        lifts = episodes("lift", 4 * seed)
        lifts[3]["success"] = None if seed else False
        add_rows(tmp_path / f"default-{seed}" / "evaluation", episodes("touch", 4) + lifts)
    (summary,) = comparison.read(tmp_path)
    grid = summary.grids["train"]
    lift = grid.of_strata({"lift"})
    rate, low, high = statistics.recipe_rate(lift, statistics.seed_effect([lift]))
    assert (rate, low < 0.02, high > 0.98) == (0.5, True, True), "two seeds say little"
    lines = table_lines([summary])
    cells = f"| {100 * rate:.0f} % [{100 * low:.0f} %, {100 * high:.0f} %] | lift 50 % | 75 % |"
    assert cells in lines[2]
    text = " ".join(lines)
    assert "Skills likewise" in text
    assert "Wilson" not in text
    assert "as a seed has no outcome there: default 1." in text


def test_columns_of_skills_are_of_the_split_that_is_asked(tmp_path):
    make_run(tmp_path, "default-0", {"train": 0})
    write_config(tmp_path / "default-0", ("train", "held_out_combination"), ("touch", "lift"))
    rows = [*episodes("touch", 4), *episodes("lift", 4)]
    rows += [r for s in ("touch", "lift") for r in episodes(s, 1, split="held_out_combination")]
    add_rows(tmp_path / "default-0" / "evaluation", rows)
    _, _, line, *_ = table_lines(comparison.read(tmp_path), "default", "held_out_combination")
    assert "| 25 % [5 %, 70 %] | 25 % [5 %, 70 %] | touch 25 % | 25 % |" in line


def test_seen_tasks_come_first_for_any_order_of_episodes(tmp_path):
    make_run(tmp_path, "default-0", {"train": 0})
    write_config(tmp_path / "default-0", ("train", "held_out_combination"), ("touch", "lift"))
    held_out = [r for s in ("touch", "lift") for r in episodes(s, 0, split="held_out_combination")]
    rows = [*held_out, *episodes("touch", 3), *episodes("lift", 1)]
    add_rows(tmp_path / "default-0" / "evaluation", rows)
    head, _, line, *_ = table_lines(comparison.read(tmp_path))
    assert "| seen | held-out combination | touch | lift |" in head
    assert "| 75 % [30 %, 95 %] | 25 % [5 %, 70 %] | lift 25 % |" in line


def test_each_robot_has_its_own_columns(tmp_path):
    for name, robots in (("both-0", ("left", "right")), ("alone-0", ("left",))):
        make_run(tmp_path, name, {"train": 0})
        evaluation = tmp_path / name / "evaluation"
        (evaluation / "results.jsonl").unlink()
        for i, robot in enumerate(robots):
            directory = evaluation / robot if len(robots) > 1 else evaluation
            add_rows(directory, episodes("touch", 1 + 2 * i), {"embodiment": robot})
    summaries = {e.variant: e for e in comparison.read(tmp_path)}
    assert summaries["both"].pooled("right: train").rate == 0.75
    assert list(summaries["alone"].success) == ["left: train"]
    assert "| left: seen | right: seen |" in table_lines(list(summaries.values()))[0]


def test_variants_are_compared_for_each_robot(tmp_path):
    """`heads` is better for both; the p-values are adjusted over the robots together."""
    for variant, wins in (("default", 0), ("heads", 4)):
        for seed in range(3):
            make_run(tmp_path, f"{variant}-{seed}", {"train": 0})
            evaluation = tmp_path / f"{variant}-{seed}" / "evaluation"
            (evaluation / "results.jsonl").unlink()
            for robot in ("left", "right"):
                add_rows(evaluation / robot, episodes("touch", wins), {"embodiment": robot})
    head, _, default, heads, *notes = table_lines(comparison.read(tmp_path))
    names = "letters (left) | letters (right) | minus default (left) | minus default (right)"
    assert f"| {names} |" in head
    assert heads.count("+100 [") == 2
    assert "| a | a | – | – |" in default
    assert "Differences to default (seen): Holm over 2." in " ".join(notes)


def test_variants_are_compared_on_the_split_of_most(tmp_path):
    """One variant with another robot, first by its name and its rate, hides no comparison."""
    for variant, robot, wins in (("a_prior", "other", 4), ("b", "arm", 1), ("c", "arm", 3)):
        make_run(tmp_path, f"{variant}-0", {"train": 0})
        evaluation = tmp_path / f"{variant}-0" / "evaluation"
        (evaluation / "results.jsonl").unlink()
        add_rows(evaluation / robot, episodes("touch", wins), {"embodiment": robot})
    summaries = comparison.read(tmp_path)
    assert [v.variant for v in comparison.ordered(summaries)] == ["c", "b", "a_prior"]
    lines = table_lines(summaries)
    assert "| arm: seen | other: seen | letters |" in lines[0]
    assert "Holm over 1 pair" in " ".join(lines)


def test_each_planned_episode_counts_once_and_other_episodes_do_not_count(tmp_path):
    make_run(tmp_path, "default-0", {"train": 0})
    crashed = episodes("touch", 2)[1] | {"success": None}
    other_seed = [r | {"seed": r["seed"] + 9} for r in episodes("touch", 4)]
    rows = [crashed, *other_seed, *episodes("lift", 4), *episodes("touch", 2)[:3]]
    add_rows(tmp_path / "default-0" / "evaluation", rows, {"checkpoint": 30})
    (summary,) = comparison.read(tmp_path)
    assert (summary.pooled("train"), summary.missing) == (SuccessRate(2, 3), 1)
    table = comparison.table([summary])
    assert "Episodes that crashed or were not run: default 1." in table
    add_rows(tmp_path / "default-0" / "evaluation", rows, {"checkpoint": 20})
    with pytest.raises(
        ValueError, match=r"is an evaluation of step 20, but the run has 30 steps; finish"
    ):
        comparison.read(tmp_path)
    add_rows(tmp_path / "default-0" / "evaluation", other_seed, {"checkpoint": 30})
    with pytest.raises(ValueError, match=r"no episode of the run's own settings .* --run .*-0"):
        comparison.read(tmp_path)
