"""The embedding is stored as it was trained, once, and looked up to the same bits."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from support import stages, tiny

from chatvla_edge.export.stages.language import EMBEDDING, language
from chatvla_edge.export.stages.weights import Parameters


def trained(dtype):
    """A model whose weights are of this type, and its parameters as a checkpoint stores them."""
    model = tiny.model()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).float())
    tensors = {name: value.to(dtype) for name, value in model.state_dict().items()}
    return model, tensors


def initializers(path):
    return {tensor.name: tensor for tensor in onnx.load(str(path), load_external_data=False).graph.initializer}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, TensorProto.BFLOAT16), (torch.float16, TensorProto.FLOAT16)]
)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_of_a_narrow_table_are_the_rows_of_the_wide_one(dtype, kind, precision, tmp_path):
    model, tensors = trained(dtype)
    wide = stages.lowered(language(model.spec, Parameters(tensors.__getitem__)), model.spec, precision)
    known = Parameters(tensors.__getitem__, lambda name: tensors[name].dtype)
    thin = stages.lowered(language(model.spec, known), model.spec, precision)
    paths = [stages.save(graph, tmp_path, name) for graph, name in ((wide, "wide"), (thin, "thin"))]
    found = initializers(paths[1])
    assert EMBEDDING not in found
    assert found[f"{EMBEDDING}.stored"].data_type == kind
    saved = model.spec.language.vocab * model.spec.language.hidden * 2
    assert wide.weight_bytes - thin.weight_bytes == saved
    inputs = stages.prompt(model.spec, 14, [(4, 6)])
    a, b = (stages.Stage(path, model.spec, in_place=True)(inputs) for path in paths)
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name])


def test_a_table_that_is_multiplied_too_stays_one_matrix(tmp_path):
    model, tensors = trained(torch.bfloat16)
    known = Parameters(tensors.__getitem__, lambda name: tensors[name].dtype)
    path = stages.save(stages.lowered(language(model.spec, known), model.spec, "fp32"), tmp_path)
    found = initializers(path)
    assert found[EMBEDDING].data_type == TensorProto.FLOAT
    assert f"{EMBEDDING}.stored" not in found


def test_an_untied_table_is_narrow_in_fp32_too(tmp_path):
    model, tensors = trained(torch.bfloat16)
    untied = model.spec.model_copy(update={"language": model.spec.language.model_copy(update={"tied": False})})
    tensors["backbone.lm_head.weight"] = tensors[EMBEDDING]
    known = Parameters(tensors.__getitem__, lambda name: tensors[name].dtype)
    found = initializers(stages.save(stages.lowered(language(untied, known), untied, "fp32"), tmp_path))
    assert found[f"{EMBEDDING}.stored"].data_type == TensorProto.BFLOAT16


def test_a_table_stored_in_fp32_stays_so(tmp_path):
    model, tensors = trained(torch.float32)
    known = Parameters(tensors.__getitem__, lambda name: tensors[name].dtype)
    found = initializers(stages.save(stages.lowered(language(model.spec, known), model.spec, "int8"), tmp_path))
    assert found[EMBEDDING].data_type == TensorProto.FLOAT
