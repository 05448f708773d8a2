"""S3-compatible object stores: from a URI to a pyarrow filesystem, and back to a URI that means the same place.

The URIs are pyarrow's own, `s3://bucket/path?endpoint_override=HOST:PORT&scheme=http&region=NAME`, with two
differences. Endpoint and region are settled once, where the URI is first read, so that a worker with another
environment finds the same store. And every client gives up on a store that does not answer.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pyarrow import fs as pafs

from raytower.errors import InputError

PREFIX = "s3://"
_CLIENT: dict[str, Any] = {
    # Three attempts each: a store that cannot be reached is given up after about 20 seconds, a silent one after 100.
    "connect_timeout": 5.0,
    "request_timeout": 30.0,
    # A small object is then one request, not the three of a multipart upload.
    "allow_delayed_open": True,
}
_DEFAULT_REGION = "us-east-1"
_FLAGS = ("allow_bucket_creation", "anonymous", "force_virtual_addressing")
_OPTIONS = ("endpoint_override", "region", "scheme", *_FLAGS)
_FLAG_VALUES = {"true": True, "1": True, "false": False, "0": False}
# Characters that would end the path of a URI or stand for another one. Letters of any script stay readable.
_RESERVED_IN_PATH = re.compile(r"[%?#\s\x00-\x1f\x7f]")


def open_s3(uri: str) -> tuple[pafs.S3FileSystem, str]:
    """The filesystem and the path (bucket/key) that an s3:// URI names.

    The endpoint is the URI's endpoint_override, else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS itself. The
    region is the URI's. Without one, AWS is asked for it; at another endpoint AWS_REGION or AWS_DEFAULT_REGION count.

    Raises:
        InputError: no bucket, or an unknown or wrong option.
        OSError: AWS was asked for the bucket's region and did not give one.
    """
    parts = urlsplit(uri, allow_fragments=False)
    if not parts.netloc:
        raise InputError(f"storage URI {uri!r} names no bucket; write s3://BUCKET/PATH")
    options = _parse_options(uri, parts.query)
    scheme, endpoint = _endpoint(options)
    bucket = unquote(parts.netloc)
    region = options.get("region")
    if region is None and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _DEFAULT_REGION
    elif region is None:
        region = pafs.resolve_s3_region(bucket)
    filesystem = pafs.S3FileSystem(
        endpoint_override=endpoint,
        scheme=scheme,
        region=region,
        **_CLIENT,
        **{name: _flag(uri, name, options[name]) for name in _FLAGS if name in options},
    )
    return filesystem, f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")


def s3_uri(filesystem: pafs.S3FileSystem, path: str) -> str:
    """The URI of a place, from which `open_s3` finds it again in another process. Credentials are not part of it."""
    # The state that a pickle carries is the one public way to a filesystem's endpoint.
    state = filesystem.__reduce__()[1][0]
    options = {"endpoint_override": state["endpoint_override"], "region": state["region"]}
    if state["scheme"] != "https":
        options["scheme"] = state["scheme"]
    options |= {name: "true" for name in _FLAGS if state[name]}
    query = "&".join(f"{name}={quote(value, safe=':/[]')}" for name, value in options.items() if value)
    return f"{PREFIX}{_RESERVED_IN_PATH.sub(lambda found: quote(found[0], safe=''), path)}?{query}"


def _parse_options(uri: str, query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise InputError(
                f"storage URI {uri!r} has the option {name!r}; the options of an s3:// URI are: {', '.join(_OPTIONS)}"
            )
    if options.get("scheme", "https") not in ("http", "https"):
        raise InputError(f"storage URI {uri!r} has scheme {options['scheme']!r}; it is http or https")
    return options


def _endpoint(options: dict[str, str]) -> tuple[str, str | None]:
    """Scheme and HOST:PORT; None stands for AWS itself."""
    given = options.get("endpoint_override")
    if given is None:
        given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, separator, host = (given or "").rpartition("://")
    return (scheme if separator else options.get("scheme", "https")), host.rstrip("/") or None


def _flag(uri: str, name: str, value: str) -> bool:
    if value.lower() not in _FLAG_VALUES:
        raise InputError(f"storage URI {uri!r} has {name}={value}; it is true or false")
    return _FLAG_VALUES[value.lower()]
