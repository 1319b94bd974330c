"""A conversation with the places of its parts in the file."""

from dataclasses import dataclass, replace

from flexllm_vllm.data.messages import ChatMessage, Tool
from flexllm_vllm.data.records import ChatRecord, PreferenceRecord, places_of


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders.

    Attributes:
        line: line of the file, from 1.
        messages, places: the messages, and the path of each in the line (``messages[0]``).
        tools, tools_place: the tools that the assistant could call, and their path.
    """

    line: int
    messages: tuple[ChatMessage, ...]
    places: tuple[str, ...]
    tools: tuple[Tool, ...]
    tools_place: str

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def field(self) -> str:
        """The path of the list that the first message is in."""
        return self.places[0].partition("[")[0]

    def first(self, count: int) -> "Conversation":
        """The conversation up to and without message ``count``."""
        return replace(self, messages=self.messages[:count], places=self.places[:count])

    def with_message(self, index: int, message: ChatMessage) -> "Conversation":
        """The conversation with another message in the place of one."""
        messages = (*self.messages[:index], message, *self.messages[index + 1 :])
        return replace(self, messages=messages)

    @classmethod
    def of_chat(cls, line: int, record: ChatRecord) -> "Conversation":
        """The conversation of a chat example."""
        places = tuple(places_of("messages", record.messages))
        return cls(line, record.messages, places, record.tools, "tools")

    @classmethod
    def of_preference(
        cls, line: int, record: PreferenceRecord, field: str, output: tuple[ChatMessage, ...]
    ) -> "Conversation":
        """The input of a preference example followed by one of its outputs."""
        places = (*places_of("input.messages", record.messages), *places_of(field, output))
        return cls(line, record.messages + output, places, record.tools, "input.tools")
