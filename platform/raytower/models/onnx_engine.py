"""A backbone that ONNX Runtime computes: takes a torch backbone's place in an encoder, on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from raytower.errors import FormatError, import_extra


class OnnxBackbone(nn.Module):
    """Maps ids and mask (B, L) to hidden states (B, L, H) by a graph; has no parameters of its own."""

    def __init__(self, session: Any, config: Any) -> None:
        super().__init__()
        self.config = config
        self._session = session

    @classmethod
    def open(cls, graph: Path, config: Any) -> OnnxBackbone:
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": mask_BL.numpy()}
        (hidden_BLH,) = self._session.run(["last_hidden_state"], feeds)
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden_BLH))
