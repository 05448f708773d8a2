"""The transformer of a model as ONNX Runtime computes it: it takes the torch module's place in the model, on CPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from raytower.errors import FormatError, import_extra


class OnnxGraph(nn.Module):
    """Maps padded rows to what the graph gives for them, under its name; has no parameters of its own."""

    def __init__(self, session: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._output = session.get_outputs()[0].name

    @classmethod
    def open(cls, graph: Path, config: Any) -> OnnxGraph:
        """Load `graph` with as many threads as torch has in this process.

        Raises:
            MissingExtraError: ONNX Runtime is not installed.
            FormatError: the file is no ONNX graph that this ONNX Runtime can load.
        """
        onnxruntime = import_extra("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FormatError(f"{str(graph)!r} cannot be loaded by ONNX Runtime: {error}") from error
        return cls(session, config)

    def forward(self, input_ids: Tensor, **others: Tensor | None) -> SimpleNamespace:
        """`last_hidden_state` (B, L, H) or `pooler_output` (B, H) of a backbone, or a classifier's `logits` (B, C).

        For ids (B, L).
        Without an attention mask no position is padding; without token types all tokens belong to the first text.
        """
        feeds = {"input_ids": input_ids.numpy()}
        for name in self._inputs[1:]:
            given = others.get(name)
            if given is None:
                given = (
                    torch.ones_like(input_ids) if name == "attention_mask" else torch.zeros_like(input_ids)
                )
            feeds[name] = given.numpy()
        (found,) = self._session.run([self._output], feeds)
        return SimpleNamespace(**{self._output: torch.from_numpy(found)})
