"""The configs of `raytower pairs` and `raytower adapt`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from raytower.annotation.config import FileType
from raytower.config import Config, OnError
from raytower.data.config import InputConfig
from raytower.refresh.config import SET_BY_ROUNDS

Rule = Literal["title", "question", "heading", "law", "neighbour", "category", "lead"]
Part = Literal["all", "train", "dev", "documents"]
# What `adapt` sets itself, by the section whose other keys a config may set.
SET_BY_ADAPT = {
    **SET_BY_ROUNDS,
    "pairs": ("input", "output", "part", "dev_share", "train_share", "apart_from", "file_type", "seed"),
    "mining": (*SET_BY_ROUNDS["mining"], "teacher"),
}


class ColumnsConfig(Config):
    """Which columns of a corpus say what. Null takes the first of the usual names that the corpus has."""

    title: str | None = None
    """Title of the text, such as a law's name; by name: title, law_name, law, name, subject, 标题, 题目, 法律名称."""
    question: str | None = None
    """Question that the text answers; by name: question, query, 问题."""
    category: str | None = None
    """Category of the text; by name: category, label, domain, 类别, 分类, 标签."""
    document: str | None = None
    """Document that the text is a passage of, whose passages stand one after another; by name: document, document_id,
    doc_id, doc, 文档."""


class GenerateConfig(Config):
    """Queries that a causal language model writes for the passages of a corpus, as InPars (Bonifacio et al. 2022)."""

    shorthand = "model"

    model: str
    """Directory or hub id of a causal language model with its tokenizer, such as Qwen3-0.6B; its chat template is
    followed where it has one."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the passages that queries are written for, drawn by seed."""
    num_queries: int = Field(default=1, ge=1)
    """Queries that are asked for each of these passages."""
    prompt_zh: str | None = None
    """Prompt of passages that are mostly Han; {text} is the passage. Null asks for a question that a user would search
    for, in Chinese."""
    prompt_en: str | None = None
    """Prompt of all other passages; {text} is the passage. Null asks for the same in English."""
    max_length: int = Field(default=512, ge=16)
    """Tokens of a prompt; a longer passage is cut."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Most tokens of a query."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the draws of tokens; 0 takes the likeliest one, by which several queries would be the same."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts that are continued side by side."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""

    def model_post_init(self, context: Any) -> None:
        for name in ("prompt_zh", "prompt_en"):
            prompt = getattr(self, name)
            if prompt is not None and "{text}" not in prompt:
                raise ValueError(
                    f"{name} is {prompt!r}, which has no {{text}} where the passage goes; put it in"
                )
        if self.temperature == 0 and self.num_queries > 1:
            raise ValueError(
                f"num_queries is {self.num_queries} and temperature 0, by which all queries of a passage are the same; "
                "set num_queries to 1, or a temperature"
            )


class PairsConfig(Config):
    """`raytower pairs`. A pair is a text that may stand for a query, and a passage of the corpus that belongs to it."""

    input: InputConfig
    """The corpus. The last of text_fields is the text; titles and other columns are found by `columns`."""
    output: str
    """File of pairs (`query document rule`), or of passages (`id text`)."""
    rules: list[Rule] = Field(
        default=["title", "question", "heading", "law", "neighbour", "category"], min_length=1
    )
    """What pairs are made of: title and text; question and answer (a column, or a question that a text begins with);
    a Markdown or numbered heading and its section; an article of a law, asked for by the law's name and number;
    neighbouring passages of a document; a category and its texts; lead is the first sentence and the rest of a text
    that gives no other pair."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which columns say what."""
    id_separator: str | None = "#"
    """Where a row names no document: that of the id law-7#12 is law-7, what stands before the last separator. Null
    takes each row for a document of its own."""
    part: Part = "all"
    """Pairs of all documents, of those that train, of those that are kept for dev; or all passages that pairs may be
    made of, for an index."""
    dev_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the documents (not of the pairs) that are kept for dev."""
    train_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the other documents that train; what is left stands in the index alone."""
    split_by: Literal["document", "category"] = "document"
    """What is kept for dev: documents, which never gives dev pairs of a category, since it has trained; or whole
    categories."""
    apart_from: InputConfig | None = None
    """Pairs, those of dev, whose texts may not occur in these; null leaves nothing out for it."""
    min_query_letters: int = Field(default=2, ge=1)
    """Pairs whose query has fewer letters are left out; a Han character is one, digits are none."""
    min_document_letters: int = Field(default=10, ge=1)
    """Pairs whose document has fewer letters are left out."""
    max_similarity: float = Field(default=0.8, gt=0, le=1)
    """Pairs whose two texts share more than this of their pairs of characters (Jaccard) are left out."""
    generate: GenerateConfig | None = None
    """Queries written by a language model, beside the pairs of structure; null writes none."""
    file_type: FileType = "tsv"
    """Type of the file that is written."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn by chance; the same one gives the same result."""
    on_error: OnError = "fail"
    """What happens with rows that cannot be read: fail stops the job, quarantine leaves them out and lists
    them."""

    def model_post_init(self, context: Any) -> None:
        if self.part == "dev" and self.dev_share == 0:
            raise ValueError("dev_share is 0, and part is dev, which then has no document; set a dev_share")


class AdaptConfig(Config):
    """`raytower adapt`: an encoder trained on a corpus without labels, kept where a pseudo-dev set shows a gain."""

    model: str
    """The encoder to begin with: a directory, a hub id or a URI."""
    corpus: InputConfig
    """The corpus; as `input` of pairs."""
    output: str
    """Folder of pairs, rounds and adapt.json."""
    teacher: str | None = None
    """Cross-encoder directory or hub id that scores candidates, which the encoder then follows (margin_mse unless
    training says another objective); null trains by in-batch and mined negatives."""
    dev_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents whose pairs are the pseudo-dev set; none of their texts trains."""
    train_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the other documents that train; what is left is indexed, and found as negatives."""
    rounds: int = Field(default=1, ge=1)
    """Most rounds of mining and training."""
    metric: str = "ndcg@10"
    """By which metric of the pseudo-dev set encoders are compared: recall@k, hit@k, mrr@k, ndcg@k, or one of
    ir-measures."""
    pairs: dict[str, Any] = Field(default={})
    """Other keys of pairs, such as {rules: [title], generate: Qwen/Qwen3-0.6B}."""
    training: dict[str, Any] = Field(default={})
    """Other keys of train-retriever, such as {batch_size: 64, epochs: 1}."""
    encoding: dict[str, Any] = Field(default={})
    """Other keys of encode."""
    indexing: dict[str, Any] = Field(default={})
    """Other keys of index build."""
    mining: dict[str, Any] = Field(default={})
    """Other keys of mine. Unless set, candidates come from vectors and from words (mode hybrid), 4 of each pair;
    without a teacher only those with less than 0.95 of the score of the pair's own document."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split into train and dev."""

    def model_post_init(self, context: Any) -> None:
        for section, names in SET_BY_ADAPT.items():
            for name in names:
                if name in getattr(self, section):
                    raise ValueError(f"{section} has {name!r}, which adapt sets itself; leave it out")
