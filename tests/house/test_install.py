"""Environments that cannot work are told apart from those that can, by their metadata alone."""

from email.message import Message
from importlib.metadata import Distribution

import pytest

from chatvla_edge.runtime.install import conflicts


class Fake(Distribution):
    """A distribution that is nothing but its metadata."""

    def __init__(self, version: str, *requires: str) -> None:
        self._metadata = Message()
        self._metadata["Version"] = version
        self._requires = list(requires)

    @property
    def metadata(self):
        return self._metadata

    @property
    def requires(self):
        return self._requires or None

    def read_text(self, filename):
        return None

    def locate_file(self, path):
        raise NotImplementedError


def found_in(**distributions: Fake) -> list[str]:
    return conflicts({name.replace("_", "-"): one for name, one in distributions.items()}.get)


def test_this_environment_has_no_conflict():
    assert conflicts() == []


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime_gpu"])
def test_one_onnxruntime_is_fine(name):
    assert found_in(**{name: Fake("1.32.0")}) == []


def test_two_onnxruntimes_are_named_with_versions_and_remedy():
    [problem] = found_in(onnxruntime=Fake("1.32.0"), onnxruntime_gpu=Fake("1.31.1"))
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed together" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    assert "chatvla-edge[cpu]" in problem
    assert "chatvla-edge[cuda]" in problem


def test_tensorrt_of_jetpack_asks_for_nothing_and_is_fine():
    assert found_in(tensorrt=Fake("10.3.0")) == []


def test_tensorrt_with_its_engine_is_fine():
    assert (
        found_in(
            tensorrt=Fake("11.4.0.106", "tensorrt_cu13==11.4.0.106"),
            tensorrt_cu13=Fake(
                "11.4", "tensorrt_cu13_libs==11.4", "tensorrt_cu13_bindings==11.4", 'numpy; extra == "x"'
            ),
            tensorrt_cu13_libs=Fake("11.4"),
            tensorrt_cu13_bindings=Fake("11.4"),
        )
        == []
    )


def test_tensorrt_from_pypi_without_its_parts_is_a_shell():
    [problem] = found_in(tensorrt=Fake("11.4.0.106", "tensorrt_cu13==11.4.0.106"))
    assert "tensorrt 11.4.0.106 is installed without tensorrt-cu13" in problem
    assert "pip uninstall -y tensorrt;" in problem
    assert "--system-site-packages" in problem


def test_tensorrt_without_libs_is_a_shell():
    [problem] = found_in(
        tensorrt_cu13=Fake("11.4", "tensorrt_cu13_libs==11.4", "tensorrt_cu13_bindings==11.4"),
        tensorrt_cu13_bindings=Fake("11.4"),
    )
    assert "tensorrt-cu13 11.4 is installed without tensorrt-cu13-libs:" in problem
