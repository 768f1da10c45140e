"""tf.train.Example, declared here so that its records can be read without TensorFlow."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_FILE = descriptor_pb2.FileDescriptorProto(name="featkd/example.proto", package="featkd")


def _declare(message: Any, *fields: tuple[str, int, int, str]) -> None:
    """Add fields (name, number, type, message type) to a message; a "*" after a name: repeated."""
    for name, number, kind, of in fields:
        message.field.add(
            name=name.rstrip("*"),
            number=number,
            type=kind,
            label=_FIELD.LABEL_REPEATED if name.endswith("*") else _FIELD.LABEL_OPTIONAL,
            type_name=f".featkd.{of}" if of else None,
        )


def _example_class() -> Any:
    """Only what images need is declared: a parser skips the rest."""
    add, group = _FILE.message_type.add, _FIELD.TYPE_MESSAGE
    _declare(add(name="BytesList"), ("value*", 1, _FIELD.TYPE_BYTES, ""))
    _declare(add(name="Int64List"), ("value*", 1, _FIELD.TYPE_INT64, ""))
    lists = (("bytes_list", 1, group, "BytesList"), ("int64_list", 3, group, "Int64List"))
    _declare(add(name="Feature"), *lists)
    features = add(name="Features")
    _declare(features, ("feature*", 1, group, "Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    _declare(entry, ("key", 1, _FIELD.TYPE_STRING, ""), ("value", 2, group, "Feature"))
    _declare(add(name="Example"), ("features", 1, group, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_FILE)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("featkd.Example"))


Example: Any = _example_class()
