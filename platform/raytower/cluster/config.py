"""The configs of `raytower cluster init` and `raytower submit`."""

from __future__ import annotations

from pydantic import Field

from raytower.config import ByteSize, Config


class ClusterInitConfig(Config):
    """`raytower cluster init`. A token that is there is kept, since clusters that run know no other."""

    token_file: str = "~/.ray/auth_token"
    """File of the token: the one that `file_mounts` of cluster.yaml names, where Ray itself looks too."""
    replace: bool = False
    """Make a new token. Clusters that run go on with the old one until `ray down` and `ray up`."""


class SubmitConfig(Config):
    """`raytower submit`. What else stands on its command line is the job's own, `--config FILE` too."""

    job: str | None = None
    """Job as on the command line, such as encode or index build; null only with `follow`."""
    arguments: list[str] = Field(default_factory=list)
    """Arguments of the job: all that stand on the command line of `submit` and are none of these keys."""
    address: str | None = None
    """Address of the cluster's dashboard, such as http://127.0.0.1:8265; null is RAY_API_SERVER_ADDRESS of the
    environment."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that the job gets with their values of here, beside those that its config names
    and that are set here. Values are never shown, nor written into arguments or the description of the job."""
    shared: list[str] = Field(default_factory=list)
    """Folders that are mounted at the same path on all nodes, so that the job's config may name paths in them."""
    driver_cpus: float | None = Field(default=None, ge=0)
    """CPUs that the job's own process holds, which then runs on a node that has them; null is 8, or what the largest
    node has to spare, where it alone computes (export, tune-classify, tune-fusion), 1 where it has workers beside it
    (evaluate, pipelines and the like), and else 0: the head."""
    driver_memory: ByteSize | None = Field(default=None, gt=0)
    """Memory that the job's own process holds; null holds none back for it."""
    max_upload: ByteSize = Field(default=ByteSize(64 * 2**20), gt=0)
    """Most bytes of files that are uploaded with a job; more are refused, and the largest named."""
    detach: bool = False
    """End once the job is submitted; `--follow` shows its log later."""
    follow: str | None = None
    """Id of a job that was submitted before, whose log is shown in place of a new one's."""

    def model_post_init(self, context: object) -> None:
        if self.job is None and self.follow is None:
            raise ValueError(
                "job is null; name one as on the command line (`raytower submit encode --config encode.yaml`), or one "
                "that runs by --follow ID"
            )
        if self.follow is not None and (self.job is not None or self.arguments or self.detach):
            given = self.job or (self.arguments and " ".join(self.arguments)) or "detach"
            raise ValueError(
                f"follow is {self.follow!r} and {given!r} is given too; --follow shows a job that was submitted before "
                "and takes --address alone"
            )
