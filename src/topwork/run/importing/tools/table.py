"""The tools whose configs are read."""

from topwork.run.importing.records import Tool
from topwork.run.importing.tools.axolotl import AXOLOTL
from topwork.run.importing.tools.llamafactory import LLAMAFACTORY
from topwork.run.importing.tools.mlx_lm import MLX_LM
from topwork.run.importing.tools.torchtune import TORCHTUNE
from topwork.run.importing.tools.trl import TRL
from topwork.run.importing.tools.unsloth import UNSLOTH

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (AXOLOTL, LLAMAFACTORY, TRL, UNSLOTH, TORCHTUNE, MLX_LM)}
"""A new tool's record stands here too."""
