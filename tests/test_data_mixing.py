"""The report of the mixing against counts in the batches of the order."""

import itertools
import re

import numpy as np
import pytest
from order_fakes import section_of

from octolike.data.pipeline import mixing
from octolike.data.pipeline.order import EpisodeTable, FrameOrder, repeats_of_groups

RNG = np.random.default_rng(0)
STEPS = {
    "similar": RNG.integers(30, 50, 1200),
    "uneven": RNG.lognormal(3.4, 0.8, 1200).astype(int) + 1,
    "few": RNG.integers(30, 50, 60),
}
GIB = 2**30


def table_of(steps, groups=None):
    groups = np.zeros(len(steps), int) if groups is None else groups
    return EpisodeTable(steps=steps, sizes=1000 * steps, groups=groups)


def report(table, *, shares=(1.0,), batch_size=32, lanes=8, pool=10**6, budget=1e12):
    repeats = repeats_of_groups(table, np.array(shares))[table.groups]
    settings = {"batch_size": batch_size, "lanes": lanes, "pool": pool, "budget": budget}
    return mixing.report(table, repeats, 3 * table.sizes, **settings), settings


def counted(table, shares, settings):
    """Return (distinct episodes, overlap with the previous batch, episodes mixed), means."""
    order = FrameOrder(table, seed=0, **settings)
    segment = order.segment(0, np.array(shares))
    sections = [section_of(order, segment, 0, lane) for lane in range(order.lanes)]
    rows = [s.rows[:, 0].reshape(-1, order.rows) for s in sections]
    batches = np.concatenate(rows, axis=1)
    mixed = [
        np.mean([sum(len(np.unique(s.blocks[b][:, 0])) for b in phase) for phase in s.mixed])
        for s in sections
    ]
    distinct = np.mean([len(np.unique(b)) for b in batches])
    overlap = np.mean([np.isin(b, a).mean() for a, b in itertools.pairwise(batches)])
    return distinct, overlap, np.sum(mixed)


CASES = {
    "pool": ("similar", {"pool": 128}),
    "memory": ("similar", {"budget": 128 * 40_000.0}),
    "one row per lane": ("similar", {"pool": 256, "lanes": 32}),
    "uneven lengths": ("uneven", {"pool": 256}),
    "all in memory": ("few", {"lanes": 4}),
    "nearly all in memory": ("few", {"lanes": 4, "pool": 75}),
    "shares": ("similar", {"pool": 256, "shares": (0.8, 0.2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_report_agrees_with_counts_in_batches(case):
    kind, settings = CASES[case]
    shares = settings.get("shares", (1.0,))
    steps = STEPS[kind]
    table = table_of(steps, np.arange(len(steps)) % len(shares))
    expected, order_settings = report(table, **settings)
    distinct, overlap, mixed = counted(table, shares, order_settings)
    assert expected.distinct == pytest.approx(distinct, rel=0.1)
    assert expected.overlap == pytest.approx(overlap, rel=0.1, abs=0.02)
    assert expected.episodes == pytest.approx(mixed, rel=0.1)
    assert bool(expected.limit) == (case != "all in memory")


def test_the_ideal_is_that_of_frames_drawn_from_all_episodes():
    table = table_of(STEPS["uneven"])
    expected, _ = report(table, pool=128)
    draws = RNG.choice(1200, (400, 32), p=table.steps / table.steps.sum())
    distinct = np.mean([len(np.unique(b)) for b in draws])
    assert expected.ideal_distinct == pytest.approx(distinct, rel=0.02)
    overlap = np.mean([np.isin(b, a).mean() for a, b in itertools.pairwise(draws)])
    assert expected.ideal_overlap == pytest.approx(overlap, abs=0.01)


@pytest.mark.parametrize("option", ["data.pool", "data.memory"])
def test_the_remedy_of_the_warning_removes_it(option):
    def described(value):
        limit = {"pool": int(value)}
        if option == "data.memory":
            limit = {"budget": value * GIB * 3 / 4 / mixing.OVERHEAD}
        return report(table_of(STEPS["similar"]), **limit)[0]

    poor = described(32 if option == "data.pool" else 32 * 40_000 / GIB)
    assert poor.is_poor
    remedy = re.search(
        rf"WARNING: only \d+% of .* limited by {option}: set {option} to (.*)$", poor.describe()
    )
    value = float(remedy[1].removeprefix("at least "))
    good = described(value)
    assert not good.is_poor
    assert "WARNING" not in good.describe()
    assert good.describe().startswith("mixing: a pool of about ")


def test_a_mix_that_is_nearly_in_memory_is_not_warned_about():
    for pool in (10**6, 75):
        assert not report(table_of(STEPS["few"]), lanes=4, pool=pool)[0].is_poor


@pytest.mark.parametrize("episodes", [100, 200, 400, 1200])
def test_the_reported_memory_stays_within_the_budget(episodes):
    table = table_of(STEPS["similar"][:episodes])
    budget = 160 * 40_000.0
    episode_bytes = report(table, budget=budget)[0].episode_bytes
    assert episode_bytes <= 1.02 * mixing.OVERHEAD * budget
    assert episode_bytes <= 2.02 * table.sizes.sum()


def test_bytes_read_per_batch_are_those_of_its_share_of_an_epoch():
    table = table_of(STEPS["similar"])
    expected, _ = report(table, pool=256)
    assert expected.bytes_per_batch == pytest.approx(32 * 3000)
