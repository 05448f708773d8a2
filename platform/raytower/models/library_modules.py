"""The modules that follow a transformer, as sentence-transformers' own classes.

`Encoder` computes Pooling, Dense and Normalize in that order by itself; every other stack of modules is carried by the
library that defined it. It is imported only for such a directory: sentence-transformers more than doubles the time that
importing transformers takes.

Shape legend: B rows, L tokens, H backbone width, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raytower.errors import FormatError, import_extra
from raytower.models.directory import inside, loading, read_json, read_json_object, tensor_shapes, write_json

# Modules that need nothing but a transformer's last hidden states, ids and mask. `True`: they have weights.
_CARRIED = {
    "Dense": True,
    "Dropout": False,
    "LayerNorm": True,
    "Normalize": False,
    "Pooling": False,
    "WordWeights": True,
}
_POOLINGS = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")
_POOLING_FLAGS = (
    "pooling_mode_cls_token",
    "pooling_mode_lasttoken",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
)
_LIBRARY = "sentence_transformers."
_PLACE = "sentence_transformers.models"


@dataclass(frozen=True)
class ListedModule:
    """An entry of modules.json."""

    type: str
    """The class's dotted name, as the file gives it."""
    place: Path
    """The module's folder."""

    @property
    def kind(self) -> str:
        """The class's own name."""
        return self.type.rsplit(".", 1)[-1]

    def settings(self) -> dict[str, Any]:
        """The module's config.json; empty where it has none."""
        return read_json_object(self.place / "config.json")


def read_modules_file(path: Path) -> list[ListedModule] | None:
    """What a model directory's modules.json lists; None where there is none.

    Raises:
        FormatError: it is no list of modules, or one is no class of sentence-transformers (a directory's own code is
            never run).
    """
    file = path / "modules.json"
    if not file.is_file():
        return None
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FormatError(f"{str(file)!r} must hold a list of modules, each an object with type and path")
    listed = [
        ListedModule(str(module.get("type")), inside(path, module.get("path"), file)) for module in modules
    ]
    for module in listed:
        if not module.type.startswith(_LIBRARY):
            raise FormatError(
                f"{str(file)!r} names the module {module.type!r}, which is code of the model's own and never run; "
                "known are modules of sentence-transformers"
            )
    return listed


class LibraryModules(nn.Module):
    """Modules of sentence-transformers in their order: a transformer's hidden states to one vector a text."""

    def __init__(self, modules: Sequence[nn.Module], types: Sequence[str]) -> None:
        """`types` are the dotted names by which modules.json lists them."""
        super().__init__()
        self.stack = nn.ModuleList(modules)
        self.types = list(types)

    @classmethod
    def load(cls, listed: Sequence[ListedModule], file: Path) -> LibraryModules:
        """Load what modules.json `file` lists behind the transformer.

        Raises:
            MissingExtraError: sentence-transformers is not installed.
            FormatError: a module that needs more than hidden states, ids and mask; one without safetensors; a setting
                that the library would replace by another.
        """
        return cls([_load(module, file) for module in listed], [module.type for module in listed])

    def forward(
        self, hidden_BLH: Tensor, mask_BL: Tensor | None, ids_BL: Tensor, unpooled_B: Tensor | None = None
    ) -> Tensor:
        """(B, L, H) → (B, D); pooling leaves out the first `unpooled_B` (B,) tokens of each row."""
        mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
        if unpooled_B is None:
            return self._vectors(hidden_BLH, mask_BL, ids_BL, 0)
        # The library knows one length of prompt for all rows of a batch, where ours may have queries and documents.
        parts = []
        for unpooled in unpooled_B.unique().tolist():
            rows = (unpooled_B == unpooled).nonzero().squeeze(1)
            parts.append((rows, self._vectors(hidden_BLH[rows], mask_BL[rows], ids_BL[rows], unpooled)))
        rows_B = torch.cat([rows for rows, _ in parts])
        return torch.cat([vectors for _, vectors in parts])[torch.argsort(rows_B)]

    def _vectors(self, hidden_BLH: Tensor, mask_BL: Tensor, ids_BL: Tensor, unpooled: int) -> Tensor:
        features: dict[str, Any] = {
            "token_embeddings": hidden_BLH,
            "attention_mask": mask_BL,
            "input_ids": ids_BL,
            "prompt_length": unpooled,
        }
        for module in self.stack:
            features = module(features)
        return cast(Tensor, features["sentence_embedding"])

    @property
    def pools_prompt(self) -> bool:
        """Whether a prompt's tokens are pooled like others."""
        return all(getattr(module, "include_prompt", True) for module in self.stack)

    def dim_after(self, width: int) -> int:
        """D for a backbone of `width`, by a pass of one token.

        Raises:
            RuntimeError, KeyError: the modules do not fit each other.
        """
        was_training = self.training
        place = next(iter(self.parameters()), torch.empty(0)).device
        one_11 = torch.zeros(1, 1, dtype=torch.long, device=place)
        with torch.no_grad():
            vector_1D = self.eval()(torch.zeros(1, 1, width, device=place), torch.ones_like(one_11), one_11)
        self.train(was_training)
        return int(vector_1D.shape[-1])

    @property
    def normalised(self) -> bool:
        """Whether vectors of unit length come out."""
        return self.types[-1].endswith(".Normalize")

    @property
    def rules(self) -> list[Any]:
        """What besides weights says what they compute."""
        return [
            [kind.rsplit(".", 1)[-1], _described(module)]
            for kind, module in zip(self.types, self.stack, strict=True)
        ]

    def save(self, folder: Path, first: int) -> list[tuple[str, str]]:
        """Write each into its folder; gives place and type of each, for modules.json. `first` numbers the first."""
        entries = []
        for number, (kind, module) in enumerate(zip(self.types, self.stack, strict=True), first):
            place = f"{number}_{kind.rsplit('.', 1)[-1]}"
            (folder / place).mkdir(exist_ok=True)
            cast(Any, module).save(str(folder / place), safe_serialization=True)
            entries.append((place, kind))
        return entries


def write_modules_file(folder: Path, entries: Sequence[tuple[str, str]]) -> None:
    """Write modules.json of (place, type) entries; a type without a dot is one of sentence-transformers."""
    listed = [
        {
            "idx": number,
            "name": str(number),
            "path": place,
            "type": kind if "." in kind else f"{_PLACE}.{kind}",
        }
        for number, (place, kind) in enumerate(entries)
    ]
    write_json(folder / "modules.json", listed)


def _load(module: ListedModule, file: Path) -> nn.Module:
    if module.kind not in _CARRIED:
        raise FormatError(
            f"{str(file)!r} names the module {module.type!r} in {str(module.place)!r} behind the transformer; carried "
            f"are {', '.join(_CARRIED)}"
        )
    settings = module.settings()
    if module.kind == "Pooling":
        _check_poolings(module, settings)
    activation = str(settings.get("activation_function", "torch.nn.Tanh"))
    if not activation.startswith("torch.nn."):
        raise FormatError(
            f"{str(module.place)!r} has the activation {activation!r}, code of the model's own, which is never run; "
            "known are modules of torch.nn"
        )
    if _CARRIED[module.kind]:
        _check_weights(module, settings)
    with loading(module.place, f"its module {module.kind}"):
        loaded: nn.Module = _class_of(module, file).load(str(module.place))
    return loaded


def _check_poolings(module: ListedModule, settings: dict[str, Any]) -> None:
    stated = settings.get("pooling_mode", [])
    modes = stated if isinstance(stated, list) else [stated]
    other = [mode for mode in modes if mode not in _POOLINGS]
    other += [
        key
        for key, value in settings.items()
        if key.startswith("pooling_mode_") and value and key not in _POOLING_FLAGS
    ]
    if other:
        raise FormatError(
            f"{str(module.place)!r} asks for pooling {other}; give one of {list(_POOLINGS)}, or a list of them"
        )


def _check_weights(module: ListedModule, settings: dict[str, Any]) -> None:
    """Safetensors only, and sizes compared before anything of these sizes is made."""
    weights = module.place / "model.safetensors"
    if not weights.is_file():
        raise FormatError(f"{str(module.place)!r} has no model.safetensors (pickle is never read)")
    shapes = tensor_shapes(weights)
    stated: tuple[Any, ...]
    if module.kind == "Dense":
        stated = (settings.get("out_features"), settings.get("in_features"))
        found = shapes.get("linear.weight")
    elif module.kind == "LayerNorm":
        stated, found = (settings.get("dimension"),), shapes.get("norm.weight")
    else:
        stated, found = (len(settings.get("vocab") or []), 1), shapes.get("emb_layer.weight")
    if stated != found:
        raise FormatError(
            f"{str(module.place)!r} states the sizes {stated} in config.json, and its weights have {found}; one of the "
            "two files belongs to another model"
        )


def _class_of(module: ListedModule, file: Path) -> Any:
    """The class by the library's present or former name. Its own lookup would also take other packages' classes."""
    library = import_extra("sentence_transformers")
    from sentence_transformers.util import import_from_string

    try:
        return import_from_string(module.type)
    except (ImportError, AttributeError) as error:
        raise FormatError(
            f"{str(file)!r} names the module {module.type!r}, which sentence-transformers {library.__version__} does "
            f"not have: {error}"
        ) from error


def _described(module: nn.Module) -> dict[str, Any]:
    described = dict(cast(Any, module).get_config_dict())
    described.pop("vocab", None)  # the weights say it
    described.pop("word_weights", None)
    return described
