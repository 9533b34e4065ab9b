r"""
PixelCNN models for Hugging Face Transformers: exact image likelihoods, and sampling at about the cost of one forward.

Importing the package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and
`AutoImageProcessor`, and the pipeline `"unconditional-image-generation"`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version
from transformers.pipelines import PIPELINE_REGISTRY

from .compression import CompressedStreamError, compress, decompress
from .configuration_gated_pixelcnn import GatedPixelCNNConfig
from .configuration_pixelcnn import PixelCNNConfig
from .configuration_pixelcnn_pp import PixelCNNPPConfig
from .generation_pixelcnn import PixelCNNGenerateOutput, PixelCNNGenerationConfig
from .image_processing_pixelcnn import PixelCNNImageProcessor
from .likelihood_pixelcnn import BernoulliOutput, CategoricalOutput, LogisticMixtureOutput, bits_per_dim
from .modeling_causal_image import CausalImageModelingOutput
from .modeling_gated_pixelcnn import (
    GatedPixelCNNForCausalImageModeling,
    GatedPixelCNNForImageClassification,
    GatedPixelCNNModel,
    GatedPixelCNNPreTrainedModel,
)
from .modeling_pixelcnn import (
    PixelCNNForCausalImageModeling,
    PixelCNNForImageClassification,
    PixelCNNModel,
    PixelCNNPreTrainedModel,
)
from .modeling_pixelcnn_pp import (
    PixelCNNPPForCausalImageModeling,
    PixelCNNPPForImageClassification,
    PixelCNNPPModel,
    PixelCNNPPPreTrainedModel,
)
from .pipeline_pixelcnn import PixelCNNImagePipeline, PixelCNNPipelineOutput
from .preview_pixelcnn import LivePreview
from .receptive_field_pixelcnn import receptive_field

__version__ = "0.1.0"

for _config, _model, _classifier in (
    (PixelCNNConfig, PixelCNNForCausalImageModeling, PixelCNNForImageClassification),
    (GatedPixelCNNConfig, GatedPixelCNNForCausalImageModeling, GatedPixelCNNForImageClassification),
    (PixelCNNPPConfig, PixelCNNPPForCausalImageModeling, PixelCNNPPForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": PixelCNNImageProcessor, "torchvision": PixelCNNImageProcessor},
        exist_ok=True,
    )
    # From here on every saved model carries the source files it needs, for use without this package.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _classifier.register_for_auto_class("AutoModelForImageClassification")
PixelCNNImageProcessor.register_for_auto_class("AutoImageProcessor")
for _task in ("unconditional-image-generation", "pixelcnn-image-generation"):  # a saved pipeline names the last one
    PIPELINE_REGISTRY.register_pipeline(_task, pipeline_class=PixelCNNImagePipeline, pt_model=AutoModel, type="image")

__all__ = [
    "BernoulliOutput",
    "CategoricalOutput",
    "CausalImageModelingOutput",
    "CompressedStreamError",
    "GatedPixelCNNConfig",
    "GatedPixelCNNForCausalImageModeling",
    "GatedPixelCNNForImageClassification",
    "GatedPixelCNNModel",
    "GatedPixelCNNPreTrainedModel",
    "LivePreview",
    "LogisticMixtureOutput",
    "PixelCNNConfig",
    "PixelCNNForCausalImageModeling",
    "PixelCNNForImageClassification",
    "PixelCNNGenerateOutput",
    "PixelCNNGenerationConfig",
    "PixelCNNImagePipeline",
    "PixelCNNImageProcessor",
    "PixelCNNModel",
    "PixelCNNPPConfig",
    "PixelCNNPPForCausalImageModeling",
    "PixelCNNPPForImageClassification",
    "PixelCNNPPModel",
    "PixelCNNPPPreTrainedModel",
    "PixelCNNPipelineOutput",
    "PixelCNNPreTrainedModel",
    "bits_per_dim",
    "compress",
    "decompress",
    "receptive_field",
]
