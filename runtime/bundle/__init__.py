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
from .semantics import Part as Meaning
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
from .wording import (
    SCALEDP_SIZES,
    bytes_in_words,
    expert_kind,
    experts_in_words,
    head_size,
    policy_in_words,
)
from .writing import BundleWriter, Sink

__all__ = [
    "MANIFEST",
    "SCALEDP_SIZES",
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
    "Meaning",
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
    "bytes_in_words",
    "components",
    "describe",
    "expert_kind",
    "experts_in_words",
    "head_size",
    "lines",
    "open_bundle",
    "policy_in_words",
    "size_after",
]
