"""The messages of the control plane, from `control.proto` as it stands beside this file: there is no generated code.

The file is compiled when this module is imported, by the compiler that comes with grpcio-tools, within a few milliseconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message
from grpc_tools import protoc

NAME = "cluster/control.proto"


def _load() -> FileDescriptor:
    """The compiled file, in protobuf's default pool, where the reflection service looks too."""
    root = Path(__file__).resolve().parents[1]
    # `grpc.protos_and_services` would look for it on sys.path, where an editable install does not show.
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        out = Path(folder) / "control.binpb"
        if protoc.main(["protoc", f"--proto_path={root}", f"--descriptor_set_out={out}", NAME]) != 0:
            raise ImportError(f"{root / NAME} does not compile; standard error says why")
        (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(NAME)


_FILE = _load()
SERVICE = _FILE.services_by_name["Control"]


def message(name: str) -> Any:
    """The class of a message, by its name in the file."""
    return message_factory.GetMessageClass(_FILE.message_types_by_name[name])


def as_dict(found: Message) -> dict[str, Any]:
    """A message as plain values; a field of its own presence that is not set is None."""
    return {field.name: _plain(found, field) for field in found.DESCRIPTOR.fields}


def _plain(found: Message, field: Any) -> Any:
    value = getattr(found, field.name)
    if field.message_type is None:
        if field.has_presence and not found.HasField(field.name):
            return None
        return list(value) if field.is_repeated else value
    if field.message_type.GetOptions().map_entry:
        return dict(value)
    return [as_dict(one) for one in value] if field.is_repeated else as_dict(value)
