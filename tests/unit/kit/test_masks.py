"""Read masks: what every list offers, and what a reply then holds."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from lensmesh.extensions.v1 import extensions_pb2
from lensmesh.extraction.v1 import extraction_pb2
from lensmesh.registry.v1 import datasets_pb2, groups_pb2, jobs_pb2, models_pb2
from lensmesh.training.v1 import training_pb2

from services.kit.errors import Invalid
from services.kit.masks import check_mask, masked

FILES = (datasets_pb2, groups_pb2, jobs_pb2, models_pb2, extraction_pb2, training_pb2, extensions_pb2)


def lists() -> list[MethodDescriptor]:
    """Methods that answer with a page."""
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(s.full_name) for f in FILES for s in f.DESCRIPTOR.services_by_name.values()]
    methods = [method for service in services for method in service.methods]
    return [method for method in methods if "page_token" in method.input_type.fields_by_name]


@pytest.mark.parametrize("method", lists(), ids=lambda method: method.name)
def test_every_list_takes_a_mask_of_its_resources(method: MethodDescriptor) -> None:
    listed, *_ = method.output_type.fields
    identity, *_ = (field.name for field in listed.message_type.fields)
    request = method.input_type._concrete_class(read_mask={"paths": [identity]})
    check_mask(request, method.output_type)
    page = method.output_type._concrete_class(total=7)
    getattr(page, listed.name).add(**{identity: "x"}, created_at={"seconds": 1})
    shown = masked(request, page)
    assert list(getattr(shown, listed.name)) == [listed.message_type._concrete_class(**{identity: "x"})]
    assert shown.total == 7


def test_a_part_of_a_part_and_what_is_not_there() -> None:
    model = models_pb2.Model(id="m", name="n", defaults={"dict_size": 64, "top_k": 32})
    request = models_pb2.GetModelRequest(read_mask={"paths": ["defaults.top_k", "device"]})
    check_mask(request, model.DESCRIPTOR)
    assert masked(request, model) == models_pb2.Model(defaults={"top_k": 32})
    with pytest.raises(Invalid):
        check_mask(models_pb2.GetModelRequest(read_mask={"paths": ["defaults.secret"]}), model.DESCRIPTOR)
    assert masked(models_pb2.GetModelRequest(), model) is model
