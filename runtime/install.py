"""What is wrong with this Python environment, found in its metadata before anything is loaded from it."""

import re
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError

Find = Callable[[str], Distribution | None]

# One module `onnxruntime`, several distributions: installing a second one overwrites files of the first, and which
# execution providers are left is then a matter of installation order.
ONNXRUNTIME = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-training",
)

# PyPI's `tensorrt` is metadata alone and asks for `tensorrt-cu13`, whose build downloads the engine (`-libs`) from
# NVIDIA. JetPack's own `tensorrt` bears the same name and asks for nothing.
TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")


def installed(name: str) -> Distribution | None:
    """The installed distribution of that name, or None."""
    try:
        return Distribution.from_name(name)
    except PackageNotFoundError:
        return None


def conflicts(find: Find = installed) -> list[str]:
    """Installations that cannot work, each as a message: what was found, why it fails, what to do."""
    return [*_shared_onnxruntime(find), *_hollow_tensorrt(find)]


def _shared_onnxruntime(find: Find) -> Iterator[str]:
    found = [(name, one.version) for name in ONNXRUNTIME if (one := find(name)) is not None]
    if len(found) > 1:
        named = " and ".join(f"{name} {version}" for name, version in found)
        yield (
            f"{named} are installed together, but each owns the module `onnxruntime` and overwrites the others' files. "
            f"Remove them, pip uninstall -y {' '.join(name for name, _ in found)}, then install one extra: "
            "pip install 'chatvla-edge[cpu]' or 'chatvla-edge[cuda]'."
        )


def _hollow_tensorrt(find: Find) -> Iterator[str]:
    for name in TENSORRT:
        if (found := find(name)) is None:
            continue
        if missing := [wanted for wanted in _required(found) if find(wanted) is None]:
            yield (
                f"{name} {found.version} is installed without {' and '.join(missing)}: a shell with no engine in it, "
                "which hides the TensorRT of the system. "
                f"Remove it, pip uninstall -y {name}; on a Jetson, make the environment with "
                "`python3 -m venv --system-site-packages`, so that JetPack's TensorRT is found."
            )


def _required(found: Distribution) -> Iterator[str]:
    """Names of the distributions that `found` cannot do without (those behind a marker are somebody's choice)."""
    for requirement in found.requires or ():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and ";" not in requirement:
            yield name.group().replace("_", "-").lower()
