"""Makes tests/fixtures/tensorboard/events with TensorBoard's own classes.

    pip install tensorboard==2.21.0
    python scripts/make_tensorboard_fixture.py

The wall times are fixed, so the file is the same each time.
"""

import io
import pathlib

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.record_writer import RecordWriter

LN_2 = 0.6931471805599453


def text(tag, contents):
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[contents.encode()], tensor_shape=shape)
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


events = [
    Event(wall_time=1.5, file_version="brain.Event:2"),
    Event(wall_time=2.0, session_log=SessionLog(status=SessionLog.START)),
    Event(
        wall_time=3.25,
        summary=Summary(value=[text("recipe/text_summary", "```toml\nbeta = 0.1\n```")]),
    ),
    Event(
        wall_time=4.0,
        step=300,
        summary=Summary(
            value=[
                Summary.Value(tag="train/loss", simple_value=LN_2),
                Summary.Value(tag="eval/rewards/margins", simple_value=-0.5),
            ]
        ),
    ),
]


class Bytes(io.BytesIO):
    """Keeps what was written when its writer closes it."""

    def close(self):
        self.kept = self.getvalue()
        super().close()


file = Bytes()
writer = RecordWriter(file)
for event in events:
    writer.write(event.SerializeToString())
writer.close()
path = pathlib.Path(__file__).parent.parent / "tests/fixtures/tensorboard/events"
path.parent.mkdir(exist_ok=True)
path.write_bytes(file.kept)
print(path, len(file.kept))
