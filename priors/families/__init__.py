"""The families of priors: what each trains, how likely it finds codes, how it samples."""

from __future__ import annotations

from priors.families.hierarchical import FAMILIES, HierarchicalConfig
from priors.families.published_masked import HaltonConfig, MaskBitConfig, TiTokConfig
from priors.networks.llama import LlamaConfig
from priors.networks.mingpt import MinGPTConfig
from priors.networks.rar import RARConfig

PRIORS = {
    **FAMILIES,
    "hierarchical": HierarchicalConfig,
    # Networks of published priors, which are told no codes of other levels.
    "llama": LlamaConfig,
    "mingpt": MinGPTConfig,
    "rar": RARConfig,
    "halton_maskgit": HaltonConfig,
    "titok": TiTokConfig,
    "maskbit": MaskBitConfig,
}
