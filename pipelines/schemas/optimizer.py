"""What a training run can be told of its loss and its optimiser."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from align.losses import LOSSES
from pipelines.config import Config
from pipelines.schemas.values import Part, Share


class LossConfig(Config):
    """The contrastive loss, with a learnable temperature."""

    name: str = Field(
        default="infonce", description=f"{', '.join(LOSSES)}, or package.module:Name."
    )
    temperature: PositiveFloat = Field(default=0.07, description="Where it starts.")
    min_temperature: PositiveFloat = Field(
        default=0.01, validate_default=True, description="How low it may go."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further options of the loss: label_smoothing of infonce, bias of sigmoid,\n"
        "gamma of global_contrastive.",
    )
    positives: str = Field(
        default="caption",
        description="Samples that agree in this field are right for each other:\n"
        "caption, key (each for itself alone), or a field of the JSON member.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES and ":" not in name:
            raise ValueError(
                f"unknown loss {name!r}; known: {', '.join(LOSSES)}, or package.module:Name"
            )
        return name

    @field_validator("min_temperature")
    @classmethod
    def _is_not_above_the_start(cls, least: float, info: Any) -> float:
        if least > info.data.get("temperature", least):
            raise ValueError(f"{least} is above temperature ({info.data['temperature']})")
        return least

    @field_validator("options")
    @classmethod
    def _has_no_keys_of_its_own(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in ("temperature", "min_temperature"):
            if key in options:
                raise ValueError(f"{key} does not belong here; set loss.{key}")
        return options


class RuleConfig(Config):
    """What a pattern of names says of the parameters that it matches."""

    match: str = Field(
        description="Pattern of parameter names, such as text.* or *.bias; * stands for anything."
    )
    rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Share of the learning rate; 0 = frozen; null = as it was."
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="In place of optimizer.weight_decay; null = as it was."
    )

    @model_validator(mode="after")
    def _says_something(self) -> "RuleConfig":
        if self.rate is None and self.weight_decay is None:
            raise ValueError(f"{self.match!r} needs a rate or a weight_decay")
        return self


class OptimizerConfig(Config):
    """The optimiser and its schedule."""

    name: str = Field(default="adamw", description="adamw, or any optimiser of timm, such as muon.")
    options: dict[str, Any] = Field(
        default={"betas": [0.9, 0.98]}, description="Keyword arguments of the optimiser."
    )
    learning_rate: PositiveFloat = Field(default=5e-4, description="At its peak.")
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine",
        description="After a linear warm-up: half a cosine down to floor; or constant, then\n"
        "linearly down to floor over the cooldown.",
    )
    floor: Share = Field(default=0.0, description="Where it ends, as a share of the peak.")
    warmup: Part = Field(
        default=0.05,
        description="Share of the run that warms up; or a length, such as 2000 steps, 1 epochs.",
    )
    cooldown: Part = Field(
        default=0.2, description="Likewise, of what cools down, where the schedule is constant."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="On matrices and kernels; never on gains, biases, temperature."
    )
    rules: list[RuleConfig] = Field(
        default_factory=list,
        description="Other rates and decays by parameter name, later ones win:\n"
        '[{match: "text.*", rate: 0.1}, {match: "*.bias", rate: 0}]; rate 0 = frozen. The run\n'
        "prints what came of them.",
    )
    max_grad_norm: PositiveFloat = Field(default=1.0, description="Longer gradients are cut.")
    average: Share = Field(
        default=0.0,
        description="Decay of the running average of the weights, which is then what is\n"
        "evaluated and saved; 0 = none.",
    )
