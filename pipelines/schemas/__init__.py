"""What each verb can be told: every key, its type, its default and what it means.

Nothing here imports torch. `align config VERB` prints these with their comments.
"""

from pipelines.schemas.data import PackConfig
from pipelines.schemas.demo import DEMO_TASKS, DemoConfig
from pipelines.schemas.doctor import DoctorConfig
from pipelines.schemas.embed import EmbedConfig
from pipelines.schemas.evaluation import EvaluateConfig, FuseConfig, HeadConfig, TaskConfig
from pipelines.schemas.index import IndexConfig
from pipelines.schemas.inspect import InspectConfig
from pipelines.schemas.interop import ExportConfig, ImportConfig
from pipelines.schemas.search import SearchConfig
from pipelines.schemas.serve import ServeConfig
from pipelines.schemas.training import ModelConfig, PretrainConfig

__all__ = [
    "DEMO_TASKS",
    "DemoConfig",
    "DoctorConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FuseConfig",
    "HeadConfig",
    "ImportConfig",
    "IndexConfig",
    "InspectConfig",
    "ModelConfig",
    "PackConfig",
    "PretrainConfig",
    "SearchConfig",
    "ServeConfig",
    "TaskConfig",
]
