"""Lists of token ids in place of texts, as OpenAI's clients send them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from raytower.errors import MissingExtraError, import_extra
from raytower.serving.calls import EmbedCall
from raytower.serving.errors import UnprocessableError
from raytower.serving.http_config import TokenIds

_REMEDY = (
    "send texts (langchain-openai does with check_embedding_ctx_length=False), or start the server with token_ids: "
    "model where the ids are of this model's own tokenizer"
)


async def with_texts(call: EmbedCall, token_ids: TokenIds) -> EmbedCall:
    """The call with the texts that its ids stand for, unless they are the model's own.

    Clients of OpenAI count tokens by tiktoken before they ask, and send what they counted: ids of `cl100k_base`. Read
    as ids of another tokenizer they would give the vectors of other texts, without a word.

    Raises:
        UnprocessableError: ids that the encoding does not have, or no tiktoken or vocabulary of it on this server.
    """
    if not call.token_ids or token_ids == "model":
        return call
    texts = await asyncio.to_thread(_decode, call.token_ids, token_ids)
    return EmbedCall(texts=texts, role=call.role)


def _decode(token_ids: Sequence[Sequence[int]], encoding: str) -> list[str]:
    try:
        # Its vocabulary is fetched once, by the internet or from TIKTOKEN_CACHE_DIR.
        known = import_extra("tiktoken").get_encoding(encoding)
    except MissingExtraError as error:
        raise UnprocessableError(f"input: holds token ids, and {error}; {_REMEDY}") from error
    except Exception as error:
        raise UnprocessableError(
            f"input: holds token ids, and tiktoken's vocabulary {encoding} could not be had on this server "
            f"({type(error).__name__}); put it into TIKTOKEN_CACHE_DIR, or {_REMEDY}"
        ) from error
    texts = []
    for number, ids in enumerate(token_ids):
        try:
            texts.append(str(known.decode(list(ids), errors="replace")))
        except (KeyError, ValueError, OverflowError) as error:
            raise UnprocessableError(
                f"input.{number}: has a token id that {encoding} has not: {error}; {_REMEDY}"
            ) from error
    return texts
