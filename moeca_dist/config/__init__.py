"""The configuration: typed, frozen, validated once, with no live objects inside.

Values come from the defaults, then the YAML file, then ``--set a.b=c``. The last one wins. An unknown, mistyped or
out-of-range value is a `UserError`. The error names the key, its place and the allowed values.
"""

from moeca_dist.config.loading import load_config as load_config
from moeca_dist.config.schema import QUALITY_NAMES as QUALITY_NAMES
from moeca_dist.config.schema import CacheConfig as CacheConfig
from moeca_dist.config.schema import Config as Config
from moeca_dist.config.schema import HalvesConfig as HalvesConfig
from moeca_dist.config.schema import ModelConfig as ModelConfig
from moeca_dist.config.schema import ParallelConfig as ParallelConfig
from moeca_dist.config.schema import QualityConfig as QualityConfig
from moeca_dist.config.schema import QualityName as QualityName
from moeca_dist.config.schema import SamplingConfig as SamplingConfig
from moeca_dist.config.schema import TelemetryConfig as TelemetryConfig
from moeca_dist.config.schema import parse_size as parse_size
from moeca_dist.config.schema import validate_world as validate_world
