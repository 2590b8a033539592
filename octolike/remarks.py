"""Sentences that every document prints beside the figures of a run."""

ONE_RUN = (
    "This is one training run: the intervals cover episodes. Another training seed of the same "
    "recipe can differ by more than they show; to compare recipes, train several seeds (octolike "
    "compare)."
)
