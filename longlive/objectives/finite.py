"""What is raised where something that must be a number is none."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a prediction is NaN or infinite; its step does not change the weights."""
