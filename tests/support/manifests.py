"""What Kubernetes is given by deploy/kuberay: overlays as kustomize builds them, and the schemas of what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

_KUBERNETES = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.37.0-local-strict"
_KUBERAY = Path(__file__).parent / "kuberay_schema.json"


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization, for the parts of kustomize that deploy/kuberay uses and no other."""
    given = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    known = {"apiVersion", "kind", "namespace", "resources", "images", "configMapGenerator", "patches"}
    assert given.keys() <= known, f"{folder}: this builder knows no {given.keys() - known}"
    objects: list[dict[str, Any]] = []
    for name in given.get("resources", ()):
        place = folder / name
        objects += build(place) if place.is_dir() else read_objects(place)
    for generator in given.get("configMapGenerator", ()):
        _generate(generator, folder, objects)
    for patch in given.get("patches", ()):
        (target,) = [
            item
            for item in objects
            if (item["kind"], item["metadata"]["name"]) == tuple(patch["target"][k] for k in ("kind", "name"))
        ]
        for change in yaml.safe_load(patch["patch"]):
            apply_change(target, change)
    for item in objects:
        if "namespace" in given and item["kind"] != "Namespace":
            item["metadata"]["namespace"] = given["namespace"]
        for container in containers_of(item):
            for image in given.get("images", ()):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return objects


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file. By way of JSON, so that what was an alias can be patched alone."""
    return [json.loads(json.dumps(item)) for item in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def _generate(generator: dict[str, Any], folder: Path, objects: list[dict[str, Any]]) -> None:
    assert generator["options"] == {"disableNameSuffixHash": True}
    data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
    if generator.get("behavior") == "merge":
        (known,) = [
            o for o in objects if (o["kind"], o["metadata"]["name"]) == ("ConfigMap", generator["name"])
        ]
        known["data"] |= data
    else:
        metadata = {"name": generator["name"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def apply_change(target: Any, change: dict[str, Any]) -> None:
    """One operation of a JSON patch (RFC 6902) on an existing place."""
    *way, last = change["path"].lstrip("/").split("/")
    for step in way:
        target = target[int(step) if isinstance(target, list) else step]
    key = int(last) if isinstance(target, list) else last
    if change["op"] == "test":
        assert target[key] == change["value"], f"{change['path']} is {target[key]!r}"
    elif change["op"] == "replace":
        assert target[key] is not None
        target[key] = change["value"]
    elif change["op"] == "remove":
        del target[key]
    else:
        raise AssertionError(f"this builder knows no {change['op']!r}")


def containers_of(item: Any) -> Iterator[dict[str, Any]]:
    """Every container below `item`."""
    for pod in pods_of(item):
        yield from pod["spec"]["containers"]


def pods_of(item: Any) -> Iterator[dict[str, Any]]:
    """Every pod template below `item`."""
    if isinstance(item, dict):
        if isinstance(item.get("spec"), dict) and "containers" in item["spec"]:
            yield item
        for value in item.values():
            yield from pods_of(value)
    elif isinstance(item, list):
        for value in item:
            yield from pods_of(value)


def schema_errors(item: dict[str, Any]) -> list[str]:
    """What Kubernetes 1.37, or KubeRay's part that is written down beside this file, would not take."""
    if item["apiVersion"] == "ray.io/v1":
        schema = json.loads(_KUBERAY.read_text(encoding="utf-8"))["$defs"].get(item["kind"])
        reference = f"https://raytower.test/kuberay.json#/$defs/{item['kind']}"
        assert schema, f"nothing is written down of {item['kind']}"
    else:
        group = {"v1": "core.v1"}.get(
            item["apiVersion"], item["apiVersion"].replace(".k8s.io", "").replace("/", ".")
        )
        reference = f"https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.{group}.{item['kind']}"
    validator = Draft202012Validator({"$ref": reference}, registry=_registry())
    return [
        f"{'/'.join(map(str, error.path))}: {error.message[:300]}" for error in validator.iter_errors(item)
    ]


@cache
def _registry() -> Registry[Any]:
    contents = [
        json.loads(place.read_text(encoding="utf-8"))
        for place in (_KUBERNETES / "_definitions.json", _KUBERAY)
    ]
    return Registry().with_resources([(item["$id"], Resource.from_contents(item)) for item in contents])
