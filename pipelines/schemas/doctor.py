"""What `doctor` can be told."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.schemas.training import PretrainConfig


class DoctorConfig(PretrainConfig):
    """What a training run would meet. Takes what `pretrain` takes; exit code 3 if it would fail."""

    seconds: PositiveFloat = Field(default=10.0, description="About how long to measure, in all.")
    shards: PositiveInt = Field(
        default=256, description="Shards to look into at most, spread evenly."
    )
    processes: PositiveInt = Field(
        default=1, description="Processes that the run will have on this machine."
    )
    output: Literal["table", "json"] = Field(default="table", description="What is printed.")

    @property
    def run(self) -> PretrainConfig:
        """The run that is asked about."""
        return PretrainConfig.model_construct(
            **{name: getattr(self, name) for name in PretrainConfig.model_fields}
        )
