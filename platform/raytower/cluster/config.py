"""The config of `raytower cluster init`."""

from __future__ import annotations

from raytower.config import Config


class ClusterInitConfig(Config):
    """`raytower cluster init`. A token that is there is kept, since clusters that run know no other."""

    token_file: str = "~/.ray/auth_token"
    """File of the token: the one that `file_mounts` of cluster.yaml names, where Ray itself looks too."""
    replace: bool = False
    """Make a new token. Clusters that run go on with the old one until `ray down` and `ray up`."""
