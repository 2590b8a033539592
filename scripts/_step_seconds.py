"""Used by compare.py: the duration of the training step of several configs, without their data."""

from octolike.config import Config


def measure_steps(configs: dict[str, Config]) -> dict[str, float]:
    """Return {variant: seconds of a training step} of {variant: config}."""
    from octolike.config import plugins
    from octolike.data.specs.planned import plan_data
    from octolike.train import step_seconds

    inputs = {}
    for name, config in configs.items():
        plugins.load_of(config)
        data = plan_data(config)
        inputs[name] = step_seconds.StepInputs(config, data.spec, data.names)
    return step_seconds.measure(inputs)
