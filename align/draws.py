"""Building a model without the random numbers that its weights would begin with."""

from typing import Any

from torch.overrides import TorchFunctionMode


class NoDraws(TorchFunctionMode):
    """Random numbers are left out while a model is built whose weights come from a file.

    What is drawn is either in the file or could never have been saved, so nothing else changes.
    Buffers that are computed, such as positions and statistics, are real, which they would not be
    in a model on the meta device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_DRAWS = {
    *("normal_", "uniform_", "trunc_normal_", "bernoulli_", "random_", "orthogonal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
}
"""By name: transformers puts functions of its own in the place of `torch.nn.init`'s."""
