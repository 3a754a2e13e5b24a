"""The bundle: the directory that an export writes and a robot loads.

Import from here; how it is divided inside is nobody's business.
"""

from .describing import describe, lines
from .errors import BundleError
from .fit import Machine, RigNeeds
from .geometry import Experts, Fusion, Geometry, Head, Language, Reasoning, Vision
from .manifest import (
    CalibrationSet,
    Camera,
    Contents,
    File,
    GateResult,
    Gates,
    Manifest,
    Pixels,
    Prompt,
    Provenance,
    Sampler,
    SamplerStep,
    Tokens,
)
from .preprocessing import CenterCrop, Jpeg, Resize, Rotate180, Step, size_after
from .reading import Bundle, Progress, open_bundle
from .resuming import ResumableWriter
from .semantics import (
    Arm,
    Gripper,
    JointPositions,
    Normalization,
    Semantics,
    TcpPosition,
    TcpRotation,
    Timing,
    Transform,
    components,
)
from .stages import (
    TARGETS,
    EmbeddingTable,
    Engine,
    Extent,
    KvCache,
    LanguageStage,
    Stage,
    Stages,
    Target,
    Tensor,
    VisionStage,
)
from .values import MANIFEST
from .writing import BundleWriter, Sink

__all__ = [
    "MANIFEST",
    "TARGETS",
    "Arm",
    "Bundle",
    "BundleError",
    "BundleWriter",
    "CalibrationSet",
    "Camera",
    "CenterCrop",
    "Contents",
    "EmbeddingTable",
    "Engine",
    "Experts",
    "Extent",
    "File",
    "Fusion",
    "GateResult",
    "Gates",
    "Geometry",
    "Gripper",
    "Head",
    "JointPositions",
    "Jpeg",
    "KvCache",
    "Language",
    "LanguageStage",
    "Machine",
    "Manifest",
    "Normalization",
    "Pixels",
    "Progress",
    "Prompt",
    "Provenance",
    "Reasoning",
    "Resize",
    "ResumableWriter",
    "RigNeeds",
    "Rotate180",
    "Sampler",
    "SamplerStep",
    "Semantics",
    "Sink",
    "Stage",
    "Stages",
    "Step",
    "Target",
    "TcpPosition",
    "TcpRotation",
    "Tensor",
    "Timing",
    "Tokens",
    "Transform",
    "Vision",
    "VisionStage",
    "components",
    "describe",
    "lines",
    "open_bundle",
    "size_after",
]
