"""What is wrong with this Python environment, found before anything is loaded from it."""

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

Version = Callable[[str], str | None]

# One module, several distributions: installing a second one overwrites files of the first, and which execution
# providers remain is then a matter of installation order.
ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def conflicts(find: Version = installed_version) -> list[str]:
    """Installations that cannot work, each as one sentence: what was found, why it fails, what to do."""
    return list(_onnxruntime(find)) + list(_tensorrt_stub(find))


def _onnxruntime(find: Version) -> Iterable[str]:
    found = [f"{name} {number}" for name in ONNXRUNTIME if (number := find(name)) is not None]
    if len(found) > 1:
        names = " ".join(entry.split()[0] for entry in found)
        yield (
            f"{' and '.join(found)} are installed together, but all own the module `onnxruntime` and overwrite each "
            f"other. Keep one: pip uninstall -y {names}, then install either the extra cpu or the extra cuda."
        )


def _tensorrt_stub(find: Version) -> Iterable[str]:
    # PyPI's `tensorrt` is a meta package that pulls a desktop build of several GB from elsewhere, or fails; on a
    # Jetson it shadows the TensorRT that JetPack installed system-wide.
    if find("tensorrt") is not None and find("tensorrt-cu12-libs") is None and find("tensorrt-cu13-libs") is None:
        from importlib.util import find_spec

        if find_spec("tensorrt") is None:
            yield (
                f"the distribution tensorrt {find('tensorrt')} from PyPI is a stub without an engine. On a Jetson, "
                "uninstall it and create the environment with --system-site-packages, so that JetPack's is found."
            )
