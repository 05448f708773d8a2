"""`raytower embed`: vectors of texts on standard output, beside sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from raytower.cli import main
from raytower.config import make_config
from raytower.errors import InputError
from raytower.retrieval.config import EmbedConfig
from raytower.retrieval.embed import plan_embed
from tests.support.tiny_models import build_tiny_encoder

TEXTS = ["opening hours", "怎么也说不出来"]


@pytest.mark.parametrize(
    ("given", "prompt"), [([], "d: "), (["--role", "query"], "q: "), (["--prefix", "x "], "x ")]
)
def test_vectors_are_those_of_the_peer_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], prompt: str
) -> None:
    folder = build_tiny_encoder(tmp_path / "encoder", prompts={"query": "q: ", "document": "d: "})
    assert main(["embed", str(folder), "--text", TEXTS[0], "--text", TEXTS[1], *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found) == ["dim", "encoder", "fingerprint", "prefix", "vectors"]
    assert (found["dim"], found["prefix"]) == (32, prompt)
    peer = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt=prompt)
    np.testing.assert_allclose(found["vectors"], peer, atol=1e-5)
    assert main(["embed", str(folder), TEXTS[0], *given]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["vectors"], peer[:1], atol=1e-5)


def test_a_text_that_shows_nothing_is_refused(dummy_encoder_dir: Path) -> None:
    for texts in ([], ["a", " "]):
        with pytest.raises(InputError):
            make_config(EmbedConfig, {"encoder": str(dummy_encoder_dir), "text": texts})
    config = make_config(EmbedConfig, {"encoder": str(dummy_encoder_dir), "text": TEXTS})
    assert plan_embed(config)["rows"] == 2
