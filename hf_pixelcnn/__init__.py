r"""
PixelCNN models for Hugging Face Transformers: exact image likelihoods, and fast exact sampling.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and
`AutoImageProcessor`, and the pipeline `"unconditional-image-generation"`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version
from transformers.pipelines import PIPELINE_REGISTRY

from . import (
    modeling_gated_pixelcnn,
    modeling_pixelcnn,
    modeling_pixelcnn_pp,
    modeling_pixelrnn,
    modeling_pixelsnail,
)
from .compressed_stream import CompressedStreamError
from .compression import compress, decompress
from .generation_causal_image import PixelCNNGenerateOutput
from .generation_config_causal_image import PixelCNNGenerationConfig
from .image_processing_causal_image import PixelCNNImageProcessor
from .likelihood_causal_image import BernoulliOutput, CategoricalOutput, LogisticMixtureOutput, bits_per_dim
from .modeling_causal_image import CausalImageModelingOutput, Family
from .modeling_gated_pixelcnn import *
from .modeling_pixelcnn import *
from .modeling_pixelcnn_pp import *
from .modeling_pixelrnn import *
from .modeling_pixelsnail import *
from .pictures_causal_image import animation, image_grid
from .pipeline_causal_image import PixelCNNImagePipeline, PixelCNNPipelineOutput
from .preview_causal_image import LivePreview, rows_as_drawn
from .receptive_field_causal_image import receptive_field
from .version import __version__

FAMILIES: dict[str, Family] = {}


def register_family(family: Family):
    r"""
    Make the Auto classes of transformers, and so the pipeline and the scripts, know a family.

    Args:
        family ([`Family`]): Its record. From here on every saved model of it carries the source files it needs, for use
            without this package.
    """
    AutoConfig.register(family.model_type, family.config_class, exist_ok=True)
    AutoModel.register(family.config_class, family.causal_class, exist_ok=True)
    AutoModelForImageClassification.register(family.config_class, family.classifier_class, exist_ok=True)
    AutoImageProcessor.register(
        family.config_class,
        image_processor_classes={"pil": PixelCNNImageProcessor, "torchvision": PixelCNNImageProcessor},
        exist_ok=True,
    )
    family.config_class.register_for_auto_class()
    family.causal_class.register_for_auto_class("AutoModel")
    family.classifier_class.register_for_auto_class("AutoModelForImageClassification")
    FAMILIES[family.model_type] = family


for _module in (
    modeling_pixelcnn,
    modeling_gated_pixelcnn,
    modeling_pixelcnn_pp,
    modeling_pixelsnail,
    modeling_pixelrnn,
):
    register_family(_module.FAMILY)
PixelCNNImageProcessor.register_for_auto_class("AutoImageProcessor")
for _task in ("unconditional-image-generation", "pixelcnn-image-generation"):  # a saved pipeline names the last one
    PIPELINE_REGISTRY.register_pipeline(_task, pipeline_class=PixelCNNImagePipeline, pt_model=AutoModel, type="image")

__all__ = [
    "FAMILIES",
    "BernoulliOutput",
    "CategoricalOutput",
    "CausalImageModelingOutput",
    "CompressedStreamError",
    "Family",
    "LivePreview",
    "LogisticMixtureOutput",
    "PixelCNNGenerateOutput",
    "PixelCNNGenerationConfig",
    "PixelCNNImagePipeline",
    "PixelCNNImageProcessor",
    "PixelCNNPipelineOutput",
    "__version__",
    "animation",
    "bits_per_dim",
    "compress",
    "decompress",
    "image_grid",
    "receptive_field",
    "register_family",
    "rows_as_drawn",
]
__all__ += modeling_gated_pixelcnn.__all__
__all__ += modeling_pixelcnn.__all__
__all__ += modeling_pixelcnn_pp.__all__
__all__ += modeling_pixelrnn.__all__
__all__ += modeling_pixelsnail.__all__
