"""What directories of the hub look like: pickled weights, configs for code of their own, families without prompts."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import (
    GteConfig,
    GteForSequenceClassification,
    GteModel,
    NomicBertConfig,
    NomicBertModel,
)

from raytower.errors import FormatError
from raytower.models import hub_forms, native_copy, trained_prefixes, unpickle
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.directory import resolve_model
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import TextClassifier
from raytower.models.trained_prefixes import own_prefix
from raytower.retrieval.load import own_or
from raytower.serving.resolve import _query_prompt
from tests.support.tiny_models import (
    build_tiny_classifier,
    build_tiny_encoder,
    tiny_tokenizer,
)

SCRIPT = Path(unpickle.__file__)
TEXTS = ["what does a deductible mean?", "a", "的债务由谁", "short one", "a longer text, " * 3]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYTOWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _all_is_said_again() -> Iterator[None]:
    yield
    hub_forms._say_once.cache_clear()
    trained_prefixes._say_once.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is converted, without the seconds that another process takes to import torch."""
    jobs = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        jobs.append(command)
        answer = json.dumps(unpickle.main(json.loads(command[-1])))
        return subprocess.CompletedProcess(command, 0, answer.encode(), b"")

    monkeypatch.setattr(native_copy.subprocess, "run", run)
    return jobs


def pickled(folder: Path, **options: Any) -> Path:
    """The directory with each safetensors file as the pickle that transformers wrote before."""
    for file in list(folder.rglob("model.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"), **options)
        file.unlink()
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def change_json(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**found, **values}), encoding="utf-8")


class TestPickledWeights:
    def test_they_are_converted_once_and_outside_of_the_directory(
        self,
        tmp_path: Path,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        exact = Encoder.load(build_tiny_encoder(tmp_path / "exact", projection_dim=8))
        model = pickled(build_tiny_encoder(tmp_path / "model", projection_dim=8))
        before = contents(model)
        assert Encoder.load(model).fingerprint == exact.fingerprint
        assert "model" in (said := capsys.readouterr().err)
        assert "2 files): they are converted to safetensors once" in said
        assert contents(model) == before
        copy = resolve_model(str(model))
        assert copy.is_relative_to(cache)
        assert not list(copy.rglob("*.bin"))
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is converted again"))
        assert Encoder.load(model).fingerprint == exact.fingerprint
        assert capsys.readouterr().err == ""
        # The copy is known by content: it stands for the same weights elsewhere, and not for others.
        elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
        assert resolve_model(str(elsewhere)) == copy
        monkeypatch.undo()
        monkeypatch.setenv("RAYTOWER_CACHE", str(cache))
        change_json(elsewhere / "config.json", hidden_act="relu")
        assert resolve_model(str(elsewhere)) != copy
        assert not [path for path in cache.rglob("*") if path.suffix in (".lock", ".tmp")]

    @pytest.mark.usefixtures("here")
    def test_in_the_form_of_before_torch_1_6(self, tmp_path: Path) -> None:
        exact = Encoder.load(build_tiny_encoder(tmp_path / "exact"))
        model = pickled(build_tiny_encoder(tmp_path / "model"), _use_new_zipfile_serialization=False)
        assert Encoder.load(model).fingerprint == exact.fingerprint

    @pytest.mark.usefixtures("here")
    def test_in_parts(self, tmp_path: Path) -> None:
        exact = Encoder.load(build_tiny_encoder(tmp_path / "exact"))
        model = build_tiny_encoder(tmp_path / "model")
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        names = sorted(weights)
        files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name in names if files[name] == file}, model / file)
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert Encoder.load(model).fingerprint == exact.fingerprint
        (model / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(FormatError, match=r"00002-of-00002\.bin' do not exist, though their index names"):
            Encoder.load(model)
        index["weight_map"][names[0]] = "../outside.bin"
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match="it must lie below the model directory"):
            Encoder.load(model)

    @pytest.mark.usefixtures("here")
    def test_of_a_transformer_in_a_folder_of_its_own(self, tmp_path: Path) -> None:
        exact = Encoder.load(build_tiny_encoder(tmp_path / "exact"))
        model = build_tiny_encoder(tmp_path / "model")
        modules = json.loads((model / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (model / "modules.json").write_text(json.dumps(modules))
        (model / "0_Transformer").mkdir()
        for file in [path for path in model.iterdir() if path.is_file()]:
            if file.name not in ("modules.json", "config_sentence_transformers.json"):
                file.rename(model / "0_Transformer" / file.name)
        assert Encoder.load(pickled(model)).fingerprint == exact.fingerprint

    @pytest.mark.usefixtures("here")
    def test_of_a_projection_alone(self, tmp_path: Path) -> None:
        exact = Encoder.load(build_tiny_encoder(tmp_path / "exact", projection_dim=8))
        model = build_tiny_encoder(tmp_path / "model", projection_dim=8)
        torch.save(
            load_file(model / "2_Dense" / "model.safetensors"), model / "2_Dense" / "pytorch_model.bin"
        )
        (model / "2_Dense" / "model.safetensors").unlink()
        assert Encoder.load(model).fingerprint == exact.fingerprint

    @pytest.mark.usefixtures("here")
    def test_of_rerankers_and_classifiers(self, tmp_path: Path) -> None:
        exact = build_tiny_classifier(tmp_path / "exact")
        model = pickled(shutil.copytree(exact, tmp_path / "model"))
        for kind in (CrossEncoder, TextClassifier):
            assert kind.load(model).fingerprint == kind.load(exact).fingerprint

    def test_safetensors_beside_them_are_what_is_read(self, tmp_path: Path) -> None:
        model = build_tiny_encoder(tmp_path / "model")
        (model / "pytorch_model.bin").write_bytes(b"anything")
        assert resolve_model(str(model)) == model

    @pytest.mark.usefixtures("here")
    def test_tied_and_overlapping_tensors_keep_their_values(self, tmp_path: Path) -> None:
        table = torch.arange(12.0).reshape(4, 3)
        held = {"tied": table, "table": table, "rows": table[1:3], "turned": table.T, "one": torch.ones(())}
        torch.save(held, tmp_path / "weights.bin")
        plan = native_copy.CopyPlan(files={}, pickles={"model.safetensors": tmp_path / "weights.bin"})
        found = load_file(native_copy.native_copy(plan, "model") / "model.safetensors")
        assert found.keys() == held.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in held.items())

    @pytest.mark.usefixtures("here")
    def test_dtypes_are_kept(self, tmp_path: Path) -> None:
        held = {str(kind): torch.ones(3, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.int64)}
        torch.save(held, tmp_path / "weights.bin")
        plan = native_copy.CopyPlan(files={}, pickles={"model.safetensors": tmp_path / "weights.bin"})
        found = load_file(native_copy.native_copy(plan, "model") / "model.safetensors")
        assert {name: str(tensor.dtype) for name, tensor in found.items()} == {name: name for name in held}

    def test_two_who_ask_at_once_convert_once(self, tmp_path: Path, here: list[list[str]]) -> None:
        model = pickled(build_tiny_encoder(tmp_path / "model"))
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(resolve_model, [str(model)] * 2)
        assert first == second
        assert len(here) == 1


class Runs:
    """What a pickle must not do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def claim_more(file: Path) -> None:
    """A small file that says it holds 2**31 - 1 numbers."""
    torch.save({"weights": torch.ones(70_000)}, file, _use_new_zipfile_serialization=False)
    said, claimed = (b"J" + struct.pack("<i", number) for number in (70_000, 2**31 - 1))
    assert said in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(said, claimed))


def cut(file: Path, **options: Any) -> None:
    torch.save({"weights": torch.ones(1000)}, file, **options)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (
        lambda f: torch.save({"a": torch.ones(1), "b": Runs(f.with_name("ran"))}, f),
        r"a pickle of more than tensors \(it names \S*system\), which may run code.*save_pretrained",
    ),
    "plain pickle": (
        lambda f: f.write_bytes(pickle.dumps(Runs(f.with_name("ran")), protocol=2)),
        r"a pickle of more than tensors \(it names \S*system\)",
    ),
    "plain pickle of today": (
        lambda f: f.write_bytes(pickle.dumps(Runs(f.with_name("ran")))),
        r"a pickle of more than tensors \(Unsupported operand",
    ),
    "a list": (lambda f: torch.save([torch.ones(1)], f), "it holds a list, not tensors by name"),
    "an int": (lambda f: torch.save({"epoch": 3}, f), "it holds 'epoch', a int and no tensor"),
    "a state": (lambda f: torch.save({"model": {"a": torch.ones(1)}}, f), "it holds 'model', a dict and no"),
    "sparse": (lambda f: torch.save({"a": torch.eye(3).to_sparse()}, f), "'a', a sparse"),
    "half": (cut, "are cut short or damaged .*download the model again"),
    "half, old form": (lambda f: cut(f, _use_new_zipfile_serialization=False), "are cut short or damaged"),
    "empty": (lambda f: f.write_bytes(b""), r"are cut short or damaged \(0 bytes"),
    "noise": (lambda f: f.write_bytes(b"noise" * 99), "are cut short or damaged"),
    "pointer": (lambda f: f.write_text(LFS), "are a Git LFS pointer.*git lfs pull"),
    "far too large": (claim_more, "ask for far more memory than tensors of their size take"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_pickle_is_refused_by_name(
    tmp_path: Path, cache: Path, request: pytest.FixtureRequest, name: str
) -> None:
    if name not in ("code", "far too large"):  # these need the process and its bounds
        request.getfixturevalue("here")
    model = build_tiny_encoder(tmp_path / "model")
    (model / "model.safetensors").unlink()
    spoil, message = SPOILED[name]
    spoil(model / "pytorch_model.bin")
    with pytest.raises(FormatError, match=message) as refused:
        resolve_model(str(model))
    assert str(model / "pytorch_model.bin") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (model / "ran").exists()
    assert not list((cache / "models").iterdir())


class TestTheProcessThatReadsPickles:
    """It waits for a pipe that nobody writes to, as it would for a disk that hangs."""

    @pytest.fixture
    def waiting(self, tmp_path: Path) -> list[str]:
        os.mkfifo(tmp_path / "weights.bin")
        return [str(tmp_path / "weights.bin"), str(tmp_path / "out.safetensors")]

    def start(self, files: list[str], seconds: int, stdin: int) -> subprocess.Popen[bytes]:
        job = {"files": [files], "memory_bytes": 2**33, "seconds": seconds}
        return subprocess.Popen([sys.executable, "-P", str(SCRIPT), json.dumps(job)], stdin=stdin)

    def test_it_ends_with_who_asked(self, waiting: list[str]) -> None:
        reading, writing = os.pipe()
        process = self.start(waiting, 600, reading)
        os.close(reading)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        os.close(writing)
        assert process.wait(60) == 1

    def test_its_time_is_bounded(self, waiting: list[str]) -> None:
        reading, writing = os.pipe()
        process = self.start(waiting, 1, reading)
        assert process.wait(60) == -signal.SIGALRM
        os.close(reading)
        os.close(writing)


class TestTheHub:
    """`snapshot_download` as it is: what matches a pattern is put into the snapshot's folder."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, list[str]]]:
        calls: list[tuple[str | None, list[str]]] = []
        snapshot = tmp_path / "hub" / "c0ffee"

        def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
            calls.append((revision, allow_patterns))
            source = tmp_path / "repository"
            for file in source.rglob("*"):
                name = file.relative_to(source).as_posix()
                if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, snapshot / name)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    @pytest.mark.usefixtures("here")
    def test_pickles_are_fetched_where_there_are_no_safetensors(
        self, tmp_path: Path, asked: list[tuple[str | None, list[str]]]
    ) -> None:
        exact = Encoder.load(build_tiny_encoder(tmp_path / "exact", projection_dim=8))
        pickled(build_tiny_encoder(tmp_path / "repository", projection_dim=8))
        (tmp_path / "repository" / "training_args.bin").write_bytes(b"not for us")
        assert Encoder.load("org/model").fingerprint == exact.fingerprint
        assert [revision for revision, _ in asked] == [None, "c0ffee"]
        assert not any(".bin" in pattern for pattern in asked[0][1])
        fetched = {
            str(path.relative_to(tmp_path / "hub" / "c0ffee")) for path in (tmp_path / "hub").rglob("*.bin")
        }
        assert fetched == {"pytorch_model.bin", "2_Dense/pytorch_model.bin"}

    def test_and_not_where_there_are(self, tmp_path: Path, asked: list[tuple[str | None, list[str]]]) -> None:
        build_tiny_encoder(tmp_path / "repository", projection_dim=8)
        (tmp_path / "repository" / "pytorch_model.bin").write_bytes(b"not for us")
        Encoder.load("org/model@v1")
        assert [revision for revision, _ in asked] == ["v1"]
        assert not list((tmp_path / "hub").rglob("*.bin"))


GTE_HUB = {
    "attention_probs_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "org/impl--configuration.NewConfig",
        "AutoModel": "modeling.NewModel",
        "AutoModelForSequenceClassification": "modeling.NewForSequenceClassification",
    },
    "classifier_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "max_position_embeddings": 128,
    "model_type": "new",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pack_qkv": True,
    "pad_token_id": 0,
    "position_embedding_type": "rope",
    "rope_scaling": None,
    "rope_theta": 20000,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "type_vocab_size": 1,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "vocab_size": 96,
}
NOMIC_HUB = {
    "activation_function": "swiglu",
    "architectures": ["NomicBertModel"],
    "attn_pdrop": 0.0,
    "auto_map": {"AutoModel": "org/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    "bos_token_id": None,
    "causal": False,
    "dense_seq_output": True,
    "embd_pdrop": 0.0,
    "eos_token_id": None,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "model_type": "nomic_bert",
    "n_embd": 32,
    "n_head": 2,
    "n_inner": 48,
    "n_layer": 2,
    "n_positions": 4096,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "rotary_emb_base": 1500,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.0,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torch_dtype": "float32",
    "transformers_version": "4.37.2",
    "type_vocab_size": 2,
    "use_cache": True,
    "use_flash_attn": True,
    "use_rms_norm": False,
    "use_xentropy": True,
    "vocab_size": 96,
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}


def seeded(model: Any) -> Any:
    """With weights that tell texts apart, biases and norms among them."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
    return model.eval()


def merged(weights: dict[str, Tensor], parts: dict[str, list[str]]) -> dict[str, Tensor]:
    """Names that end with one of `parts` put together, row after row, in the first's place."""
    found = dict(weights)
    for whole, names in parts.items():
        for first in [name for name in weights if f".{names[0]}." in name]:
            rows = [found.pop(first.replace(f".{names[0]}.", f".{part}.")) for part in names]
            found[first.replace(f".{names[0]}.", f".{whole}.")] = torch.cat(rows)
    return found


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        for before, after in names.items():
            name = name.replace(before, after)
        found[name] = tensor.contiguous()
    return found


def write_hub(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A plain directory in the hub's form, whose code says so if it is ever run."""
    folder.mkdir(parents=True)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name in ("modeling.py", "configuration.py"):
        (folder / name).write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    return folder


def gte_weights(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """By the names of the published code: q, k and v in one matrix, and up before gate in another."""
    parts = {
        "qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "up_gate_proj": ["mlp.up_proj", "mlp.gate_proj"],
    }
    names = {
        "gte.": prefix,
        "layers.": "encoder.layer.",
        ".self_attn.o_proj": ".attention.o_proj",
        ".qkv_proj": ".attention.qkv_proj",
        ".up_gate_proj": ".mlp.up_gate_proj",
        "post_attention_layernorm": "attn_ln",
        "post_mlp_layernorm": "mlp_ln",
    }
    return renamed(merged(model.state_dict(), parts), names)


def nomic_weights(model: Any) -> dict[str, Tensor]:
    parts = {"attn.Wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
    names = {
        "layers.": "encoder.layers.",
        "embeddings.LayerNorm": "emb_ln",
        "self_attn.o_proj": "attn.out_proj",
        "up_proj": "fc11",
        "gate_proj": "fc12",
        "down_proj": "fc2",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
    }
    return renamed(merged(model.state_dict(), parts), names)


def mean_vectors(model: Any) -> np.ndarray:
    """Unit vectors (N, H) of TEXTS by a model of transformers alone: the mean over tokens, each text by itself."""
    tokenizer, rows = tiny_tokenizer(), []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden_1LH = model(
                input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]
            ).last_hidden_state
        rows.append(torch.nn.functional.normalize(hidden_1LH[0].mean(0), dim=0))
    return torch.stack(rows).numpy()


def gte_config(theta: float = 20000.0) -> GteConfig:
    rope = {"rope_type": "default", "rope_theta": theta}
    return GteConfig(**SIZES, max_position_embeddings=128, hidden_dropout_prob=0.1, rope_parameters=rope)


class TestConfigsForCodeOfTheirOwn:
    @pytest.mark.parametrize("kind", ["new", "gte"])
    def test_gte_multilingual_gives_the_vectors_of_transformers_own_class(
        self, tmp_path: Path, kind: str
    ) -> None:
        model = seeded(GteModel(gte_config()))
        config = {**GTE_HUB, "model_type": kind, "architectures": ["NewModel"]}
        folder = write_hub(tmp_path / "gte", config, gte_weights(model))
        encoder = Encoder.load(folder)
        assert encoder.max_positions == 128
        np.testing.assert_allclose(ForwardEngine(encoder).encode(TEXTS), mean_vectors(model), atol=1e-6)
        assert not (folder / "ran").exists()

    def test_its_scaled_positions_are_those_of_the_published_code(self, tmp_path: Path) -> None:
        model = seeded(GteModel(gte_config()))
        # Fixed NTK scaling as it was published: another base, and all frequencies over factor^(2/d), d = 16.
        plain = np.array([(8 * 20000.0) ** (-2 * pair / 16) for pair in range(8)])
        model.rotary_emb.inv_freq = torch.tensor(plain / 8 ** (2 / 16), dtype=torch.float32)
        config = {**GTE_HUB, "rope_scaling": {"factor": 8.0, "type": "ntk"}}
        encoder = Encoder.load(write_hub(tmp_path / "gte", config, gte_weights(model)))
        np.testing.assert_allclose(ForwardEngine(encoder).encode(TEXTS), mean_vectors(model), atol=1e-6)
        unscaled = mean_vectors(seeded(GteModel(gte_config())))
        assert np.abs(unscaled - mean_vectors(model)).max() > 1e-3

    def test_what_the_config_leaves_out_is_the_published_codes_default(self, tmp_path: Path) -> None:
        model = seeded(GteModel(gte_config(theta=10_000.0)))
        config = {key: value for key, value in GTE_HUB.items() if not key.startswith(("rope", "max_pos"))}
        encoder = Encoder.load(write_hub(tmp_path / "gte", config, gte_weights(model)))
        assert encoder.max_positions == 2048
        np.testing.assert_allclose(ForwardEngine(encoder).encode(TEXTS), mean_vectors(model), atol=1e-6)

    def test_the_reranker(self, tmp_path: Path) -> None:
        config = gte_config()
        config.num_labels = 1
        model = seeded(GteForSequenceClassification(config))
        hub = {**GTE_HUB, "architectures": ["NewForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
        folder = write_hub(tmp_path / "reranker", hub, gte_weights(model, "new."))
        tokenizer = tiny_tokenizer()

        def ids(text: str) -> Tensor:
            cut_1L: Tensor = tokenizer(TEXTS[0], text, truncation=True, return_tensors="pt")["input_ids"]
            return cut_1L

        with torch.no_grad():
            expected = [float(model(input_ids=ids(text)).logits) for text in TEXTS]
        change_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
        scores = CrossScorer(CrossEncoder.load(folder)).score([TEXTS[0]] * len(TEXTS), TEXTS)
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert not (folder / "ran").exists()

    def test_it_is_saved_as_what_transformers_and_the_peer_load(self, tmp_path: Path) -> None:
        model = seeded(GteModel(gte_config()))
        folder = write_hub(tmp_path / "gte", {**GTE_HUB, "architectures": ["NewModel"]}, gte_weights(model))
        encoder = Encoder.load(folder)
        encoder.save(tmp_path / "saved")
        assert Encoder.load(tmp_path / "saved").fingerprint == encoder.fingerprint
        assert resolve_model(str(tmp_path / "saved")) == tmp_path / "saved"
        peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS)
        np.testing.assert_allclose(ForwardEngine(encoder).encode(TEXTS), peer, atol=1e-6)

    def test_nomic_gives_the_vectors_of_transformers_own_class(self, tmp_path: Path) -> None:
        rope = {"rope_type": "default", "rope_theta": 1500.0}
        model = seeded(
            NomicBertModel(NomicBertConfig(**SIZES, max_position_embeddings=4096, rope_parameters=rope))
        )
        folder = write_hub(tmp_path / "nomic", NOMIC_HUB, nomic_weights(model))
        encoder = Encoder.load(folder)
        assert encoder.max_positions == 4096
        np.testing.assert_allclose(ForwardEngine(encoder).encode(TEXTS), mean_vectors(model), atol=1e-6)

    @pytest.mark.usefixtures("here")
    def test_pickled_too(self, tmp_path: Path) -> None:
        model = seeded(GteModel(gte_config()))
        folder = pickled(write_hub(tmp_path / "gte", GTE_HUB, gte_weights(model)))
        np.testing.assert_allclose(
            ForwardEngine(Encoder.load(folder)).encode(TEXTS), mean_vectors(model), atol=1e-6
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"logn_attention_scale": True}, "has logn_attention_scale True"),
            ({"position_embedding_type": "absolute"}, "has position_embedding_type 'absolute'"),
            ({"layer_norm_type": "rms_norm"}, "has layer_norm_type 'rms_norm'"),
            ({"pack_qkv": False}, "has pack_qkv False"),
            ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "has rope_scaling {'type': 'dynamic'"),
            ({"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.6}}, "'mixed_b': 0.6"),
            ({"rope_theta": "large"}, "has .*rope_theta 'large'"),
            ({"sliding_window": 64}, "has sliding_window 64"),
        ],
    )
    def test_a_variant_that_the_class_does_not_compute_is_refused_by_name(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        folder = write_hub(tmp_path / "gte", {**GTE_HUB, **change}, gte_weights(GteModel(gte_config())))
        with pytest.raises(FormatError, match=f"code of its repository.*{message}.*does not compute that"):
            Encoder.load(folder)

    def test_experts_of_nomic_are_refused_by_name(self, tmp_path: Path) -> None:
        config = {**NOMIC_HUB, "moe_every_n_layers": 2, "num_experts": 8, "activation_function": "gelu"}
        del config["n_inner"]
        folder = write_hub(tmp_path / "nomic", config, {"a": torch.ones(1)})
        with pytest.raises(
            FormatError,
            match=r"has moe_every_n_layers 2, num_experts 8, activation_function 'gelu' and lacks n_inner",
        ):
            Encoder.load(folder)

    def test_a_kind_that_transformers_does_not_know_is_refused_with_its_module(self, tmp_path: Path) -> None:
        config = {**GTE_HUB, "model_type": "brand_new"}
        folder = write_hub(tmp_path / "model", config, {"a": torch.ones(1)})
        with pytest.raises(
            FormatError, match=r"kind 'brand_new'.*\(modeling\.NewModel\), which is never run"
        ):
            Encoder.load(folder)
        assert not (folder / "ran").exists()

    def test_code_for_a_kind_that_transformers_knows_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = build_tiny_encoder(tmp_path / "model")
        change_json(folder / "config.json", auto_map={"AutoModel": "modeling_own.BertModel"})
        Encoder.load(folder)
        Encoder.load(folder)
        said = capsys.readouterr().err
        assert said.count("names code of its repository (modeling_own.BertModel), which is never run") == 1

    @pytest.mark.parametrize(
        ("auto_map", "changes", "said"),
        [
            ("modeling_own.BertBiModel", {}, "transformers has no class of that name for 'bert'"),
            (
                "modeling_qwen.Qwen2Model",
                {"model_type": "qwen2"},
                "does not say whether tokens see those behind",
            ),
        ],
    )
    def test_code_that_may_compute_something_else_is_refused(
        self, tmp_path: Path, auto_map: str, changes: dict[str, Any], said: str
    ) -> None:
        folder = build_tiny_encoder(tmp_path / "model")
        change_json(folder / "config.json", auto_map={"AutoModel": auto_map}, **changes)
        with pytest.raises(FormatError, match=said):
            Encoder.load(folder)

    @pytest.mark.parametrize("kind", [Encoder, CrossEncoder])
    def test_a_module_of_its_own_is_refused_before_weights_are_read(self, tmp_path: Path, kind: Any) -> None:
        folder = build_tiny_encoder(tmp_path / "model")
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["type"] = "custom_st.Transformer"
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(FormatError, match=r"names the module 'custom_st\.Transformer', which is code"):
            kind.load(folder)


class TestTrainedPrefixes:
    @pytest.mark.parametrize(
        ("name", "query", "document"),
        [
            ("intfloat/e5-base-v2", "query: ", "passage: "),
            ("intfloat/multilingual-e5-small@abc", "query: ", "passage: "),
            ("/models/multilingual-e5-large", "query: ", "passage: "),
            ("s3://bucket/intfloat_e5-small", "query: ", "passage: "),
            (
                "intfloat/multilingual-e5-large-instruct",
                "Instruct: <the task in one sentence>\nQuery: ",
                "",
            ),
            ("BAAI/bge-large-zh-v1.5", "为这个句子生成表示以用于检索相关文章：", ""),
            ("~/hub/models--BAAI--bge-small-zh/snapshots/1", "为这个句子生成表示以用于检索相关文章：", ""),
            ("BAAI/bge-base-en", "Represent this sentence for searching relevant passages: ", ""),
        ],
    )
    def test_families_are_told_by_name(self, name: str, query: str, document: str) -> None:
        found = trained_prefixes.trained_prefixes([name])
        assert found is not None
        assert (found.query, found.document) == (query, document)

    @pytest.mark.parametrize(
        "name",
        [
            "BAAI/bge-m3",
            "BAAI/bge-large-zh-noinstruct",
            "BAAI/bge-reranker-base",
            "me/our-e5-base",
            "e5",
            "runs/encoder",
        ],
    )
    def test_others_are_not(self, name: str) -> None:
        assert trained_prefixes.trained_prefixes([name]) is None

    @pytest.fixture
    def e5(self, tmp_path: Path) -> Path:
        folder = build_tiny_encoder(tmp_path / "intfloat" / "e5-small")
        (folder / "raytower.json").unlink()
        return folder

    def said(self, capsys: pytest.CaptureFixture[str], folder: Path, name: str | None = None) -> str:
        encoder = Encoder.load(folder)
        for role in ("query", "document", "query"):
            assert own_prefix(encoder, role, name or str(folder)) == encoder.prefix_for(role)
        return capsys.readouterr().err

    def test_one_without_prompts_is_warned_of_once(
        self, e5: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = self.said(capsys, e5)
        assert said.count("\n") == 1
        assert "'query: ' and documents behind 'passage: '" in said
        assert "query_prefix and document_prefix (encode: prefix)" in said

    def test_it_is_told_by_the_name_that_its_config_kept(
        self, tmp_path: Path, e5: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        e5.rename(tmp_path / "model")
        assert self.said(capsys, tmp_path / "model") == ""
        change_json(tmp_path / "model" / "config.json", _name_or_path="BAAI/bge-base-zh-v1.5")
        said = self.said(capsys, tmp_path / "model")
        assert "为这个句子生成表示以用于检索相关文章：" in said
        assert "go without it until prompts of its config" in said
        assert said.endswith("a job is about, query_prefix\n")

    @pytest.mark.usefixtures("here")
    def test_pickled_weights_do_not_hide_the_name(self, e5: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "'query: '" in self.said(capsys, pickled(e5))

    def test_prompts_and_what_was_trained_here_need_no_warning(
        self, tmp_path: Path, e5: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        change_json(e5 / "config_sentence_transformers.json", prompts={"query": "q: "})
        assert self.said(capsys, e5) == ""
        build_tiny_encoder(e5)  # raytower.json is there again
        assert self.said(capsys, e5) == ""

    def test_documents_of_a_family_that_knows_queries_alone_need_none(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = build_tiny_encoder(tmp_path / "bge-base-en-v1.5")
        (folder / "raytower.json").unlink()
        encoder = Encoder.load(folder)
        own_prefix(encoder, "document", str(folder))
        assert capsys.readouterr().err == ""
        own_prefix(encoder, "query", str(folder))
        assert "behind 'Represent this sentence" in capsys.readouterr().err

    def test_a_configured_prefix_needs_none_and_a_server_says_it_too(
        self, e5: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        encoder = Encoder.load(e5)
        assert own_or("", encoder, "query", str(e5)) == ""
        assert capsys.readouterr().err == ""
        assert _query_prompt(str(e5), e5) == ""
        assert "behind 'query: '" in capsys.readouterr().err
