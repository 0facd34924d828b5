"""The column schema of a table artifact, for the Columns tab of the UI."""

import dagster as dg
import pyarrow as pa

COLUMNS = {
    "id": "Hash of the content: the same row has the same id in every file and order.",
    "group": "Rows of one group stay on one side of the split: the same prompt, or the row's own "
    "`group`.",
    "stratum": "The value of the field that data.stratify names.",
    "messages": "The turns, as role and content. Tool calls are JSON. `train: false` marks answers "
    "that are context only.",
    "tools": "The available tools, as JSON.",
    "source": "The file and the line that the row comes from.",
    "digest": "Hash of the whole row. Content versions are made of it.",
    "judged": "True if the conversation is whole and ends in an answer. Only such a row can be "
    "held out.",
    "input_ids": "Tokens of the conversation in this model's own template.",
    "options": "The answers to choose from, for the metric `choice`.",
    "expected": "The text that answers are compared with, where it is not the last message's.",
    "decoded": "The text that the answer's tokens decode to, where it is not the expected one.",
    "supervised": "The loss mask: True for the answers and their end of turn.",
}


def column_schema(schema: pa.Schema) -> dict[str, dg.TableSchema]:
    """Return the metadata that shows an Arrow schema in the UI."""
    columns = [
        dg.TableColumn(field.name, str(field.type), description=COLUMNS.get(field.name))
        for field in schema
    ]
    return {"dagster/column_schema": dg.TableSchema(columns)}
